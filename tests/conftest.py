from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerBase

from tests.long import pytest_addoption, pytest_configure  # noqa: F401 (hooks)

# How long an example takes depends on the machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A small byte-level BPE with the tokens and the chat template of Qwen3."""
    # Imported here, since tests/gpu runs on machines without TRL, whose templates these are.
    from tests.chat.tokenizers import small_tokenizer

    return small_tokenizer("qwen3")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with a tiny random Qwen3 and that tokenizer."""
    from tests.models import make_model

    folder = tmp_path_factory.mktemp("tiny_model")
    make_model("qwen3", vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
