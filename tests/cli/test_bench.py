import json

import pytest

from onepass_trl.cli import main
from onepass_trl.tools.bench import workload
from tests.chats import CHATS

CPU_ONLY = ["--peers", "onepass cpu", "sdpa causal"]  # what needs no compiler


@pytest.fixture
def bench(capsys):
    """A function that runs the command and returns exit status, output and errors."""

    def run(*flags):
        status = main(["bench", "--use_cpu", "--repeats=1", *map(str, flags)])
        return status, *capsys.readouterr()

    return run


def test_a_model_that_cannot_fit_is_refused(bench, monkeypatch):
    monkeypatch.setattr(workload, "available_bytes", lambda device: 1000)
    status, _, error = bench("--step")
    assert status == 2
    assert "two copies of the model with gradients and AdamW take 0." in error
    assert "and 0.0 GiB are free: use fewer layers with --num_layers" in error


def test_a_dataset_is_measured_and_written(bench, chats, tiny_model_dir, tmp_path):
    output = tmp_path / "bench.json"
    status, out, _ = bench(
        chats, f"--model_name_or_path={tiny_model_dir}", "-k2", f"--json={output}", *CPU_ONLY
    )
    assert status == 0
    assert "2 conversations of" in out
    assert "random weights" in out
    assert "executed / useful" in out
    assert "The losses of a step differ by at most" in out
    written = json.loads(output.read_text())
    assert written["name"] == "bench"
    assert written["command"].startswith("onepass-trl bench --use_cpu --repeats=1 ")
    assert {"cpu", "threads"} <= set(written["machine"])
    *attention, step = written["results"]
    assert [result["implementation"] for result in attention] == ["onepass cpu", "sdpa causal"]
    assert [result["part"] for result in written["results"]] == ["attention", "attention", "step"]
    assert step["largest_loss_difference"] < 1e-5
    assert step["turns"] == 4
    assert step["n_pass_tokens"] > step["one_pass_tokens"] > 0


def test_without_a_dataset_a_chat_is_made_up(bench):
    flags = ["--turns=2", "--user=3", "--reasoning=8", "--response=4", "--attention", *CPU_ONLY]
    status, out, _ = bench(*flags)
    assert status == 0
    assert "2 turns (tokens of a turn: 3 of user, 8 of reasoning, 4 of response)" in out
    assert "a small Qwen3: 4 layers" in out
    assert "Training step" not in out


def test_attention_of_a_packed_row(bench, chats, tiny_model_dir, tmp_path):
    output = tmp_path / "bench.json"
    flags = [f"--model_name_or_path={tiny_model_dir}", "--attention", f"--json={output}"]

    def tokens(*more: str) -> int:
        assert bench(chats, *flags, *more, *CPU_ONLY)[0] == 0
        return json.loads(output.read_text())["results"][0]["seq"]

    assert tokens("-k2", "--packed") > tokens("-k2") >= tokens("-k1", "--packed") == tokens("-k1")


def test_turns_without_reasoning_are_measured_too(bench, tmp_path, tiny_model_dir):
    messages = [{k: m[k] for k in ("role", "content")} for m in CHATS[0]["messages"]]
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    flags = [f"--model_name_or_path={tiny_model_dir}", "--num_layers=1", "--step"]
    status, out, _ = bench(path, *flags, "--max_length=30")
    assert status == 0
    assert "conversation 0: 1 pass cut to 30 tokens" in out
    assert ": 1 layer, " in out


def test_the_turns_that_are_chosen_are_trained(bench, chats, tiny_model_dir, tmp_path):
    output = tmp_path / "bench.json"
    flags = [f"--model_name_or_path={tiny_model_dir}", "--num_layers=1", "--step"]
    assert bench(chats, *flags, "--train_on=last", f"--json={output}")[0] == 0
    assert json.loads(output.read_text())["results"][0]["turns"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none.jsonl", "--model_name_or_path={model}"], "there is no such file"),
        (["{chats}"], "a dataset needs --model_name_or_path"),
        (["{chats}", "--model_name_or_path={model}", "--turns=3"], "but a dataset is given too"),
        (["--train_on=last"], "--train_on needs a dataset, but none is given"),
        (["--packed"], "--packed needs a dataset, but none is given"),
        (["-k=2"], "--num_conversations needs a dataset, but none is given"),
        (["--step", "--peers", "flex"], "--peers is about attention, but --step times training"),
        (["--dtype=float8"], "invalid choice: 'float8'"),
        (["--json={folder}/none/bench.json"], "does not exist; create it"),
        (["--num_layers=9"], "expected 1 to 4"),
        (["--repeats=0"], "--repeats: expected a whole number of at least 1, got 0"),
        (["--attention", "--step"], "not allowed with argument"),
        (["--turns=1", "--peers", "paper"], "there is no peer 'paper'"),
        (["--max_length=-3"], "--max_length: expected a whole number of at least 2, got -3"),
        (["--turns=99999999999"], "lower --turns, --user, --reasoning or --response"),
        (["--reasoning=9999999999"], "tokens in its N passes, expected at most 100,000,000"),
        (["--max_length=20"], "the chat has no trained token within --max_length 20"),
        (["{broken}", "--model_name_or_path={model}"], "has none of the accepted forms"),
    ],
)
def test_wrong_input_is_one_message_and_status_two(
    bench, flags, message, chats, tiny_model_dir, tmp_path, capsys
):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "What?"}\n')
    names = dict(model=tiny_model_dir, chats=chats, folder=tmp_path, broken=broken)
    try:
        status, _, error = bench(*(flag.format(**names) for flag in flags))
    except SystemExit as exit_:  # argparse's
        status, error = exit_.code, capsys.readouterr().err
    assert status == 2
    assert message in error
    assert "Traceback" not in error
