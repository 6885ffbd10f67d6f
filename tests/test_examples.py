import doctest
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import onepass_trl.training.trainer
from onepass_trl import build_tree, linearize, render_passes
from onepass_trl.cli import setsft
from onepass_trl.cli.sft import make_parser
from tests.images import make_image_model, make_processor

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


def test_the_questions_have_traces_that_differ(tiny_tokenizer):
    rows = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text().splitlines()]
    assert any(len(row["prompt"]) > 1 for row in rows)
    for row in rows:
        assert len({c["reasoning_content"] for c in row["completions"]}) >= 3
        for completion in row["completions"]:
            render_passes([*row["prompt"], completion], tiny_tokenizer, train_on="last")


def test_the_yaml_file_of_sets_is_understood():
    _, config, _, _ = setsft.make_parser().parse_args_and_config(
        ["--config", str(EXAMPLES / "setsft.yaml"), "--use_cpu", "--bf16=False"],
        fail_with_unknown_args=True,
    )
    assert (config.num_forking_tokens, config.matching_tokens) == (6, 1000)


def test_the_modes_of_the_example_all_reach_the_sum(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("setsft_modes")
    for digits in example.make_questions(50, seed=1):
        traces = {example.trace(digits, mode) for mode in example.MODES}
        assert len(traces) == len(example.MODES)
        assert {text.partition("</think>")[2] for text in traces} == {str(sum(digits) % 6)}


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").iterdir()), ids=lambda p: p.stem)
def test_the_launcher_configurations_are_accelerates(path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(path)
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


def test_one_step_has_the_loss_and_gradients_of_n_passes():
    n_passes, one_pass, gradients = run(["one_step.py"]).splitlines()
    tokens, losses = zip(
        *(
            re.search(r"(\d+) tokens, loss ([\d.]+)", line).groups()
            for line in (n_passes, one_pass)
        ),
        strict=True,
    )
    assert int(tokens[0]) > int(tokens[1])
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    assert float(gradients.split()[-1]) < 1e-4


@pytest.mark.parametrize(
    "command",
    [
        ["demo.py", "--steps=3", "--output={folder}"],
        pytest.param(
            ["train.py", "--model={model}", "--data={data}", "--steps=2", "--output={folder}"],
            marks=pytest.mark.long("examples"),
        ),
    ],
    ids=lambda command: command[0],
)
def test_the_scripts_run(command, tmp_path, tiny_model_dir):
    names = dict(folder=tmp_path, model=tiny_model_dir, data=EXAMPLES / "conversations.jsonl")
    run([part.format(**names) for part in command])
    assert any(tmp_path.rglob("model.safetensors"))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_drawings_are_trained(tmp_path, monkeypatch):
    """With the processor of the tests, as transformers loads none of these without torchvision."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("train_on_images")
    make_image_model("qwen3_vl").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(
        onepass_trl.training.trainer,
        "load_processing_class_of",
        lambda *_: make_processor("qwen3_vl"),
    )
    flags = ["--records=3", "--steps=1", f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["", f"--model={tmp_path / 'model'}", *flags])
    example.main()
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").exists()


@pytest.mark.long("examples", "onepass_trl/setsft")
def test_the_modes_are_trained_and_plotted(tmp_path):
    flags = ["--steps=2", "--seeds", "0", "1", "--questions=40", "--held-out=4"]
    run(["setsft_modes.py", *flags, f"--output={tmp_path}"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["seed"] for result in results] == [0, 0, 0, 1, 1, 1]
    assert all(len(result["accuracy"]) == 4 for result in results)
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "modes.png").stat().st_size > 10_000


@pytest.mark.long("examples", "onepass_trl")
def test_thinking_is_compared_in_five_ways(tmp_path):
    flags = ["--seeds=0", "--first-steps=2", "--steps=2", "--batch=5", "--held-out=4"]
    report = run(["thinking_survives.py", *flags, f"--output={tmp_path}"])
    [result] = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(result["ways"]) == 5
    for after in result["ways"].values():
        assert all(len(shares["thinks"]) == 5 for shares in after.values())
    # The two exact ways differ by rounding alone.
    assert result["difference"]["largest_loss"] < 1e-5
    assert "one pass against one record per turn" in report


def test_arithmetic_is_read_and_judged(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("arithmetic_chats")
    tested = doctest.testmod(example)
    assert tested.attempted > 2
    assert tested.failed == 0
    tokenizer = example.make_tokenizer()
    chat = example.make_conversation(np.random.default_rng(0), example.SUMS, 3)
    for turn in (1, 3, 5):
        context, whole = (
            tokenizer.apply_chat_template(chat[:end], tokenize=False, add_generation_prompt=prompt)
            for end, prompt in ((turn, True), (turn + 1, False))
        )
        completion = whole.removeprefix(context).removesuffix("<|im_end|> ").strip()
        answer = example.read_answer(completion)
        assert answer == example.solve(chat[:turn])
        assert all(example.judge(answer, chat[turn]))
        unreasoned = {"role": "assistant", "content": answer["content"]}
        assert example.judge(unreasoned, chat[turn]) == (False, False, True)


def run(command):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / command[0]), *command[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
