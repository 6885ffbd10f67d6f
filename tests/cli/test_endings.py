"""How a verb ends, whatever a user does: with a line and a status, never with a traceback."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from safetensors import SafetensorError

from onepass_trl.cli import VERBS, main, report_errors, setsft, sft
from onepass_trl.cli.arguments import reading
from onepass_trl.cli.sft import launch, make_parser
from tests.chats import CHATS, write_jsonl

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
import signal, sys, time
signal.signal(signal.SIGINT, {on_interrupt})
print("started", flush=True)
while True:
    time.sleep(0.05)  # not signal.sigwait, which an interrupt doesn't end
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
    # Other tests may have left processes, such as torch.compile's.
    monkeypatch.setattr(
        "psutil.Process.children", lambda _: [psutil.Process(x.pid) for x in processes]
    )
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


def test_a_full_disk_is_no_fault_of_the_model_that_is_loaded():
    def from_pretrained(pretrained_model_name_or_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as found, reading("the weights of", "tiny"):
        from_pretrained("tiny")
    assert found.value.errno == errno.ENOSPC


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


def _edited(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


TRAINING_DAMAGE = {
    **{what: (name, damage) for what, (name, damage, _) in DAMAGE.items()},
    "another shape": ("config.json", lambda path: _edited(path, hidden_size=48)),
    "another type": ("config.json", lambda path: _edited(path, hidden_size="many")),
    "an unknown function": ("config.json", lambda path: _edited(path, hidden_act="none")),
    "an unknown class": ("config.json", lambda path: _edited(path, architectures=["None"])),
    "a list": ("tokenizer_config.json", lambda path: path.write_text("[]")),
}


def train_tiny(verb, dataset, model, tmp_path, *flags):
    """Return the exit status of a training of one step."""
    argv = [f"--dataset_name={dataset}", f"--model_name_or_path={model}", "--max_steps=1"]
    argv += [f"--output_dir={tmp_path / 'out'}", "--use_cpu", "--report_to=none", *flags]
    return report_errors({"sft": sft, "setsft": setsft}[verb].train, argv)


@pytest.mark.parametrize("what", TRAINING_DAMAGE)
@pytest.mark.parametrize("verb", ["sft", "setsft"])
def test_training_names_damaged_files_of_a_model(
    verb, what, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    name, damage = TRAINING_DAMAGE[what]
    damage(model / name)
    records = CHATS if verb == "sft" else [{"prompt": "2+2?", "completions": ["4", "Four"]}]
    dataset = write_jsonl(tmp_path / "records.jsonl", records)
    assert train_tiny(verb, dataset, model, tmp_path) == 2
    error = capsys.readouterr().err
    assert f"the model {model} can't be read" in error or f" in {model}" in error
    assert not (tmp_path / "made").exists()


def test_an_error_of_training_is_not_taken_for_a_damaged_file(
    chats, tiny_model_dir, tmp_path, monkeypatch
):
    def broken(*args, **kwargs):
        raise AttributeError("broken")

    monkeypatch.setattr("onepass_trl.training.OnePassSFTTrainer.__init__", broken)
    with pytest.raises(AttributeError, match="broken"):
        train_tiny("sft", chats, tiny_model_dir, tmp_path)


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"env"}))
def test_a_model_that_is_not_there(verb, chats, tmp_path, capsys):
    model = tmp_path / "no" / "model"
    if verb in ("sft", "setsft"):
        assert train_tiny(verb, chats, model, tmp_path) == 2
    else:
        assert main([verb, str(chats), f"--model_name_or_path={model}"]) == 2
    assert f"there is no model '{model}': expected a folder, or the name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--model_name_or_path=", "no model: give --model_name_or_path"),
        ("--chat_template_kwargs={", "a flag has '{', which isn't JSON"),
    ],
)
def test_flags_that_cannot_be_met(flag, expected, chats, tiny_model_dir, tmp_path, capsys):
    assert train_tiny("sft", chats, tiny_model_dir, tmp_path, flag) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--report_to=wandb", "--report_to can't be met: WandbCallback requires wandb to be inst"),
        ("--optim_args=fast", "--optim and --optim_args can't be met: not enough values"),
        (
            '--lr_scheduler_kwargs={{"fast": 1}}',
            "--lr_scheduler_type and --lr_scheduler_kwargs can't be met: get_linear_schedule",
        ),
        ("--output_dir={file}", "no files can be written to --output_dir {file}: File exists"),
        ("--output_dir={file}/out", "no files can be written to --output_dir {file}/out: Not a d"),
        ("--chat_template_path={file}.jinja", "No such file or directory: '{file}.jinja'"),
        ("--chat_template_path={folder}", "'{folder}' can't be loaded: "),
        ("--model_name_or_path={folder}", "'{folder}' can't be loaded: "),
    ],
)
def test_what_a_training_cannot_use_is_named(
    flag, expected, chats, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", bool)
    folder = tmp_path / "empty"
    folder.mkdir()
    names = {"file": chats, "folder": folder}
    assert train_tiny("sft", chats, tiny_model_dir, tmp_path, flag.format(**names)) == 2
    assert expected.format(**names) in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["inspect", "estimate", "verify"])
def test_a_folder_without_a_model_is_named(verb, chats, tmp_path, capsys):
    assert main([verb, str(chats), f"--model_name_or_path={tmp_path}"]) == 2
    assert f"'{tmp_path}' can't be loaded: " in capsys.readouterr().err


def test_training_resumes_from_the_last_checkpoint(chats, tiny_model_dir, tmp_path, capsys):
    flags = ("--save_strategy=steps", "--save_steps=1", "--resume_from_checkpoint")
    assert train_tiny("sft", chats, tiny_model_dir, tmp_path, *flags, "true") == 2
    assert "No valid checkpoint found in output directory" in capsys.readouterr().err
    assert train_tiny("sft", chats, tiny_model_dir, tmp_path, *flags, "false") == 0
    flags = ("--max_steps=2", *flags)
    assert train_tiny("sft", chats, tiny_model_dir, tmp_path, *flags, "true") == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.parametrize("verb", ["sft", "setsft"])
def test_training_takes_one_dataset(verb, tmp_path, capsys):
    argv = [verb, "a.jsonl", "--dataset_name=b.jsonl", f"--output_dir={tmp_path}", "--use_cpu"]
    assert main(argv) == 2
    assert "the dataset is named twice, as 'a.jsonl' and with" in capsys.readouterr().err


def test_a_full_disk_says_where_files_are_written(capsys):
    def full(argv):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_file(argv):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    assert report_errors(full, []) == 2
    error = capsys.readouterr().err
    assert "No space left on device: make room, or choose another folder; prepared data" in error
    assert f" in {datasets.config.HF_DATASETS_CACHE} (HF_DATASETS_CACHE), temporary " in error
    assert "(TMPDIR), outputs where flags say" in error
    assert report_errors(full_file, []) == 2
    assert "No space left on device: 'model.safetensors'\n" in capsys.readouterr().err


def test_weights_that_cannot_be_written_say_where(
    chats, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert train_tiny("sft", chats, tiny_model_dir, tmp_path) == 2
    assert (
        f"weights in {tmp_path / 'out'} can't be written or read: Error" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("given", "number"), [(None, 2), ("1", None)])
def test_processes_share_the_cpus_unless_the_user_says_how(given, number, monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    argv = ["a.jsonl", f"--output_dir={tmp_path}", "--use_cpu", "--num_processes=2"]
    assert launch(argv, make_parser(), "none") == 0
    assert launched[0].num_cpu_threads_per_process == number


def test_a_package_that_is_not_installed(capsys):
    def import_it(argv):
        raise ImportError("using `bits` requires bits: pip install bits")

    assert report_errors(import_it, []) == 2
    assert "error: using `bits` requires bits" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["max_length: {a: 1}", "datasets: 5"])
def test_values_of_another_type_in_a_file_of_flags(text, tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    path.write_text(text)
    assert main(["sft", "--config", str(path), f"--output_dir={tmp_path}", "--use_cpu"]) == 2
    assert "a value of the --config file isn't of its flag's type" in capsys.readouterr().err


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
