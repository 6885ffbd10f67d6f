"""How a verb ends, whatever a user does: with a line and a status, never with a traceback."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onepass_trl.cli import VERBS, main, report_errors
from onepass_trl.cli.sft import launch, make_parser
from tests.chats import CHATS

COMMAND = [sys.executable, "-m", "onepass_trl.cli"]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_is_one_line(verb, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"onepass_trl.cli.{verb}.main", interrupted)
    assert main([verb]) == 130
    assert capsys.readouterr().err == "\nonepass-trl: interrupted\n"


def test_of_several_processes_one_says_that_it_is_interrupted(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert report_errors(interrupted, []) == 130
    assert capsys.readouterr().err == ""


# Says when it can be interrupted, and ends as a verb does, or not at all.
PROCESS = """
import signal, sys
signal.signal(signal.SIGINT, {on_interrupt})
print("started", flush=True)
signal.sigwait([signal.SIGTERM])
"""


@pytest.mark.parametrize("ends", [True, False])
def test_an_interrupt_ends_the_processes_of_a_training(ends, monkeypatch, tmp_path):
    processes = []

    def launch_command(_):
        on_interrupt = "lambda *_: sys.exit(130)" if ends else "signal.SIG_IGN"
        text = PROCESS.format(on_interrupt=on_interrupt)
        process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
        processes.append(process)
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        raise KeyboardInterrupt

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    monkeypatch.setattr("onepass_trl.cli.sft._SECONDS_TO_END", 30 if ends else 0.1)
    argv = ["a.jsonl", f"--output_dir={tmp_path}", "--use_cpu", "--bf16=False"]
    if ends:
        assert launch(argv, make_parser(), "none") == 130
    else:
        with pytest.raises(KeyboardInterrupt):
            launch(argv, make_parser(), "none")
    assert processes[0].wait(timeout=10) is not None
    processes[0].stdout.close()


def test_output_that_nobody_reads_ends_quietly(chats, tiny_model_dir):
    flags = ["estimate", str(chats), f"--model_name_or_path={tiny_model_dir}"]
    reader, writer = os.pipe()
    os.close(reader)
    # argparse itself ignores that help can't be written.
    for arguments, statuses in ((flags, {141}), (["--help"], {0, 141})):
        ended = subprocess.run(
            [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
        assert ended.returncode in statuses
        assert "Error" not in ended.stderr
    os.close(writer)


@pytest.mark.parametrize("verb", ["inspect", "verify", "estimate", "bench"])
def test_an_empty_name_of_a_dataset(verb, tiny_model_dir, capsys):
    assert main([verb, "", f"--model_name_or_path={tiny_model_dir}"]) == 2
    assert "the name of the dataset is '', expected one of the Hub" in capsys.readouterr().err


class _Call:
    """What a pickle of weights could do: call a function."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(path: Path, content: object) -> None:
    path.unlink()
    (path.parent / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))


DAMAGE = {
    "pickled code": ("model.safetensors", lambda path: _pickled(path, _Call()), "weights"),
    "a pickle of no weights": ("model.safetensors", lambda path: _pickled(path, 7), "weights"),
    "cut weights": ("model.safetensors", _cut, "weights"),
    "no tokenizer": ("tokenizer.json", lambda path: path.write_text("{}"), "tokenizer"),
    "no JSON": ("tokenizer_config.json", lambda path: path.write_text("["), "tokenizer"),
    "deep JSON": ("config.json", lambda path: path.write_text("[" * 100_000), "tokenizer"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files_of_a_model_are_named(
    what, chats, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    name, damage, part = DAMAGE[what]
    damage(model / name)
    assert main(["verify", str(chats), f"--model_name_or_path={model}", "-k=1"]) == 2
    assert f"the {part} of {model} can't be read" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("flag", ["--train_on", "--chat_template_kwargs"])
def test_deep_arguments(flag, chats, tiny_model_dir, capsys):
    deep = '{"a":' * 20_000
    with pytest.raises(SystemExit):
        main(["estimate", str(chats), f"--model_name_or_path={tiny_model_dir}", f"{flag}={deep}"])
    assert f"argument {flag}: " in capsys.readouterr().err


def test_a_deep_file_of_flags(tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    path.write_text("a: " + "[" * 100_000)
    assert main(["sft", "--config", str(path)]) == 2
    assert "is not YAML: " in capsys.readouterr().err


def test_more_threads_than_processors_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--threads=100000"])
    error = capsys.readouterr().err
    assert f"--threads: expected at most {os.cpu_count()}, the CPUs of this machine" in error
    assert torch.get_num_threads() < 100_000


def test_names_do_not_control_the_terminal(tiny_model_dir, tmp_path, capsys):
    name = "a\x1b[2Jb\u202e.jsonl"
    path = tmp_path / name
    flags = [f"--model_name_or_path={tiny_model_dir}"]
    path.write_text("{")
    assert main(["inspect", str(path), *flags]) == 2
    path.write_text(json.dumps(CHATS[0]))
    with pytest.raises(SystemExit):
        main(["inspect", str(path), name, *flags])
    outputs = [f"--json={tmp_path}/\x1b.json"]
    assert main(["estimate", str(path), *flags, *outputs]) == 0
    assert main(["inspect", str(path), *flags, f"--html={tmp_path}/\x1b.html"]) == 0
    shown = "".join(capsys.readouterr())
    assert shown.count("␛[2Jb⟨202E⟩.jsonl") >= 3
    assert shown.count("Wrote") == 2
    assert "\x1b" not in shown
    assert "\u202e" not in shown
