"""Conversations in a file, and verbs that read them."""

import copy

import pytest

from onepass_trl.chat import processing
from onepass_trl.cli import main
from tests.chats import CHATS, write_jsonl
from tests.images import make_image_model, make_processor


@pytest.fixture
def chats(tmp_path):
    return write_jsonl(tmp_path / "chats.jsonl", CHATS)


@pytest.fixture
def run_on_chats(tiny_model_dir, tmp_path, capsys):
    """A function that runs a verb on conversations and returns exit status, output and errors."""

    def run(verb, chats, *flags, model=tiny_model_dir):
        path = write_jsonl(tmp_path / "chats.jsonl", chats)
        status = main([verb, str(path), f"--model_name_or_path={model}", *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def image_model_dir(tmp_path, monkeypatch):
    """A folder with a tiny Qwen3-VL, of which verbs load the processor of the tests.

    transformers loads none of this model without torchvision.
    """
    make_image_model("qwen3_vl").save_pretrained(tmp_path / "image_model")
    monkeypatch.setattr(
        processing,
        "load_processing_class",
        lambda *_, **__: copy.deepcopy(make_processor("qwen3_vl")),
    )
    return tmp_path / "image_model"
