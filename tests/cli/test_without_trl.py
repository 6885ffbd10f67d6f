"""The verbs that run no model, where TRL can't be imported."""

import subprocess
import sys

import pytest

# An entry of None makes an import of the module fail.
RUN = "import sys; sys.modules['trl'] = None; from onepass_trl.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("verb", "expected"), [("estimate", "Predicted by operations"), ("inspect", "trunk")]
)
def test_the_verb_runs_without_trl(verb, expected, tiny_model_dir, chats):
    model = f"--model_name_or_path={tiny_model_dir}"
    command = [sys.executable, "-c", RUN, verb, str(chats), model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
