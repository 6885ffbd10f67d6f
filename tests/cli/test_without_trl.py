"""The verbs that run no model, where TRL can't be imported."""

import json
import subprocess
import sys

import pytest

from tests.chats import CHATS

# An entry of None makes an import of the module fail.
RUN = "import sys; sys.modules['trl'] = None; from onepass_trl.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("verb", "expected"), [("estimate", "Predicted by operations"), ("inspect", "trunk")]
)
def test_the_verb_runs_without_trl(verb, expected, tiny_model_dir, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    command = [sys.executable, "-c", RUN, verb, str(path), f"--model_name_or_path={tiny_model_dir}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
