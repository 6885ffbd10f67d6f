import json
import shutil
from functools import partial

import pytest
import torch

from onepass_trl.cli import main
from onepass_trl.tools.bench import workload
from tests.chats import CHATS, write_jsonl


@pytest.fixture
def estimate(run_on_chats):
    return partial(run_on_chats, "estimate")


def test_a_dataset_is_estimated(estimate, tmp_path):
    flags = [f"--json={tmp_path / 'out.json'}", "--max_length=200"]
    status, out, _ = estimate(CHATS, *flags)
    assert status == 0
    value = json.loads((tmp_path / "out.json").read_text())
    assert "all conversations" in out
    assert f"N-pass takes {value['flops_ratio']:.2f} times as long" in out
    assert value["conversations"] == 8
    assert value["n_pass"]["rows"] == 16
    assert value["model"]["name"] == "Qwen3ForCausalLM"
    assert value["packed_rows"] < value["one_pass"]["rows"] == 8


def test_some_conversations_are_drawn(estimate, tmp_path):
    values = []
    for seed in (0, 0, 1):
        _, out, _ = estimate(CHATS, "-k3", f"--seed={seed}")
        assert "3 of 8 conversations" in out
        values.append(out)
    assert values[0] == values[1]


def test_train_on_and_template_arguments_count(estimate):
    _, all_turns, _ = estimate(CHATS)
    _, last_turn, _ = estimate(CHATS, "--train_on=last")
    assert "No conversation has two trained turns" in last_turn
    assert "No conversation has two trained turns" not in all_turns
    with pytest.raises(SystemExit):
        estimate(CHATS, "--train_on=some")


def test_a_measured_estimate(estimate, tmp_path):
    status, out, _ = estimate(CHATS, "--measure", "-k4", f"--json={tmp_path / 'out.json'}")
    assert status == 0
    value = json.loads((tmp_path / "out.json").read_text())
    assert f"Predicted: N-pass takes {value['time_ratio']:.2f} times as long" in out
    assert value["seconds"]["n_pass"] > 0


def test_a_figure_is_drawn(estimate, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, _ = estimate(CHATS, f"--png={tmp_path / 'out.png'}")
    assert status == 0
    assert "out.png" in out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_too_large_to_measure_is_refused_before_it_is_built(estimate, monkeypatch):
    monkeypatch.setattr(workload, "available_bytes", lambda device: 1000)
    status, _, error = estimate(CHATS, "--measure", "-k1")
    assert status == 2
    assert "the model with gradients takes 0.0 GiB without activations, and 0.0 GiB" in error
    assert "estimate without --measure" in error


def test_a_folder_without_a_config(estimate, tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "tokenizer")
    (folder / "config.json").unlink()
    status, out, _ = estimate(CHATS, model=folder)
    assert status == 0
    assert "no step-time ratio is predicted" in " ".join(out.split())
    status, _, error = estimate(CHATS, "--measure", model=folder)
    assert status == 2
    assert "has no config.json" in error


@pytest.mark.parametrize("flags", [["estimate", "--measure", "-k2"], ["verify"], ["env"]])
def test_a_cuda_build_of_torch_without_a_gpu_uses_the_cpu(
    flags, tiny_model_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    path = write_jsonl(tmp_path / "chats.jsonl", CHATS[:2])
    verb, *rest = flags
    model = f"--model_name_or_path={tiny_model_dir}"
    named = {"estimate": [str(path), model], "verify": [str(path), model]}
    assert main([verb, *named.get(verb, []), *rest]) == 0
    out = capsys.readouterr().out
    assert {"estimate": "every position", "verify": "agrees", "env": "devices: cpu"}[verb] in out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--json=missing/out.json", "does not exist; create it"),
        ("--png=missing/out.png", "does not exist; create it"),
        ("--json=.", "is a folder, name a file in it"),
        ("--png=out.pdf", "expected a name that ends in .png"),
        ("--json={input}", "would replace {input}, which is read; name another file"),
        ("--overflow=error", None),
    ],
)
def test_bad_input(estimate, tmp_path, flag, message):
    if message is None:
        flag, message = "--overflow=error", "raise max_length to at least"
        status, _, error = estimate(CHATS, flag, "--max_length=20")
    else:
        names = {"input": tmp_path / "chats.jsonl"}
        status, _, error = estimate(CHATS, flag.format(**names))
        message = message.format(**names)
    assert status == 2
    assert message in error


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--max_length=-3", "--max_length: expected a whole number of at least 2, got -3"),
        ("--num_conversations=-1", "expected a whole number of at least 0, got -1"),
    ],
)
def test_numbers_that_make_no_sense(estimate, flag, message, capsys):
    with pytest.raises(SystemExit):
        estimate(CHATS, flag)
    assert message in capsys.readouterr().err


def test_a_missing_file(tiny_model_dir, capsys):
    assert main(["estimate", "none.jsonl", f"--model_name_or_path={tiny_model_dir}"]) == 2
    assert "no such file" in capsys.readouterr().err
