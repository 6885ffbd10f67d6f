"""What README.md says can be run as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
from datasets import Dataset

from onepass_trl.cli import VERBS
from onepass_trl.cli.sft import make_parser
from tests.conversations import as_row, random_chat
from tests.models import make_model

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"^ {4}(\S.*?)(?: {2,}#.*)?$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("code", [block for block in BLOCKS if "onepass_trl" in block])
def test_python_blocks_run(code, tmp_path, monkeypatch, tiny_tokenizer, tiny_model_dir):
    """The block is run as it is; the names it takes for granted are a folder and a dataset."""
    monkeypatch.chdir(tmp_path)
    dataset = Dataset.from_list([as_row(random_chat(2, vocab_size=len(tiny_tokenizer)))])
    names = {"model": str(tiny_model_dir), "dataset": dataset}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["trainer"].train_dataset) == 1


def test_every_command_exists():
    targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert COMMANDS
    for command in COMMANDS:
        program, argument, *rest = shlex.split(command)
        if program == "make":
            assert argument in targets
        elif program == "onepass-trl":
            assert argument in VERBS
        else:
            assert (program, argument) == ("pip", "install")
        for word in rest:
            if word.startswith("examples/"):
                assert (REPOSITORY / word).is_file()


def test_every_option_in_the_table_exists():
    table = README.split("### Options of its own")[1].split("\n\n")[1]
    options = re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)
    flags = make_parser().format_help()
    assert options == [
        "train_on",
        "overflow",
        "null_arguments",
        "chat_template_kwargs",
        "verify_rendering",
        "attention_impl",
    ]
    assert all(f"--{option}" in flags for option in options)


def test_models_named_as_tested_are_tested():
    assert (
        make_model("deepseek_v3").config.qk_nope_head_dim
        != make_model("deepseek_v3").config.v_head_dim
    )
