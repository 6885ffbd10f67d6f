"""Conversations in a file, and verbs that read them."""

import pytest

from onepass_trl.cli import main
from tests.chats import CHATS, write_jsonl


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
