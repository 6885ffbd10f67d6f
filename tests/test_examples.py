import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from onepass_trl import build_tree, linearize, render_passes
from onepass_trl.cli.sft import make_parser

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
CONVERSATIONS = [
    json.loads(line) for line in (EXAMPLES / "conversations.jsonl").read_text().splitlines()
]


def test_the_conversations_render_and_share_their_trunks(tiny_tokenizer):
    assert len(CONVERSATIONS) >= 24
    assert sum("tools" in conversation for conversation in CONVERSATIONS) >= 4
    for conversation in CONVERSATIONS:
        turns = [m for m in conversation["messages"] if m["role"] == "assistant"]
        assert all(turn["reasoning_content"] for turn in turns)
        passes = render_passes(
            conversation["messages"], tiny_tokenizer, tools=conversation.get("tools")
        )
        assert len(passes) == len(turns) >= 3
        assert len(linearize(build_tree(passes))) < sum(map(len, passes))


def test_the_yaml_file_is_understood():
    _, config, model, _ = make_parser().parse_args_and_config(
        ["--config", str(EXAMPLES / "sft.yaml"), "--use_cpu", "--bf16=False"],
        fail_with_unknown_args=True,
    )
    assert config.packing
    assert model.model_name_or_path == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").iterdir()), ids=lambda p: p.stem)
def test_the_launcher_configurations_are_accelerates(path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(path)
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["demo.py", "--steps=3", "--output={folder}"],
        ["train.py", "--model={model}", "--data={data}", "--steps=2", "--output={folder}"],
    ],
    ids=lambda command: command[0],
)
def test_the_scripts_run(command, tmp_path, tiny_model_dir):
    names = dict(folder=tmp_path, model=tiny_model_dir, data=EXAMPLES / "conversations.jsonl")
    command = [part.format(**names) for part in command]
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / command[0]), *command[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert any(tmp_path.rglob("model.safetensors"))
