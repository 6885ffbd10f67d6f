import sys
from functools import partial

import pytest
from transformers import MambaConfig

from onepass_trl.cli import main
from tests.chats import CHATS
from tests.models import make_model


@pytest.fixture
def inspect(run_on_chats):
    return partial(run_on_chats, "inspect")


def test_a_conversation_is_shown_as_a_tree(inspect, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    page = tmp_path / "row.html"
    status, out, _ = inspect(CHATS, "--row=2", f"--html={page}")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "trunk"
    assert lines[1].startswith("├── user 0  ")
    assert "What is 2 plus 2?" in lines[1]
    assert sum("branch of turn" in line for line in lines) == 2
    assert sum("  trained  <think>⏎" in line for line in lines) == 2
    assert " x (layers without a window)" in out
    assert "tiles of 64 x 64" in out
    assert "chats.jsonl, row 2" in page.read_text()


def test_a_conversation_commands_no_terminal_and_no_markup(inspect, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = "[bold]no[/bold] [/] \x1b[31mred\x07"
    chat = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}]}
    status, out, _ = inspect([chat])
    assert status == 0
    assert "[bold]no[/bold] [/] ␛[31mred␇" in out
    assert "\x1b" not in out
    assert "Only one turn is trained" in out


def test_a_dataset_without_reasoning_is_told_what_is_saved(inspect):
    messages = [{k: m[k] for k in ("role", "content")} for m in CHATS[0]["messages"]]
    status, out, _ = inspect([{"messages": messages}])
    assert status == 0
    assert "No trained turn has reasoning. One pass still saves" in out


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("mistral", "in the 2 layers with a window of 5: one pass"),
        ("qwen3", None),
        ("mamba", "cannot be trained in one pass"),
        ("unknown", "The model's layers aren't known"),
    ],
)
def test_what_the_model_of_the_folder_adds(inspect, tiny_tokenizer, tmp_path, model, line):
    tiny_tokenizer.save_pretrained(tmp_path / model)
    if model == "unknown":
        (tmp_path / model / "config.json").write_text('{"model_type": "not_yet_made"}')
    else:
        config = MambaConfig(hidden_size=8) if model == "mamba" else make_model(model).config
        config.save_pretrained(tmp_path / model)
    status, out, _ = inspect(CHATS, f"--model_name_or_path={tmp_path / model}")
    assert status == 0
    assert (line or "without a window") in out
    assert ("with a window of" in out) == (model == "mistral")


@pytest.mark.parametrize("row", [8, -1])
def test_a_row_out_of_range(inspect, row):
    status, _, error = inspect(CHATS, f"--row={row}")
    assert status == 2
    assert f"--row {row} is out of range" in error
    assert "has 8 rows, 0..7" in error


def test_missing_file_and_folder(inspect, tiny_model_dir, capsys):
    assert main(["inspect", "none.jsonl", f"--model_name_or_path={tiny_model_dir}"]) == 2
    assert "no such file" in capsys.readouterr().err
    status, _, error = inspect(CHATS, "--html=missing_folder/row.html")
    assert status == 2
    assert "does not exist; create it" in error


def test_the_picture_is_written_and_named(inspect, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "row.png"
    status, out, _ = inspect(CHATS, "--row=1", f"--png={picture}")
    assert status == 0
    assert f"Wrote {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    def refuse(picture):
        assert main(["inspect", "none.jsonl", "--model_name_or_path=none", f"--png={picture}"]) == 2
        return capsys.readouterr().err

    pytest.importorskip("matplotlib")
    assert "expected a name that ends in .png" in refuse("row.pdf")
    assert "does not exist; create it" in refuse(tmp_path / "none" / "row.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refuse("row.png")


def test_turns_keep_their_numbers_when_some_are_trained(inspect, capsys):
    status, out, _ = inspect(CHATS, "--train_on=last")
    assert status == 0
    assert "branch of turn 1" in out
    assert "branch of turn 0" not in out
    passes = [
        {"input_ids": [5, 6, 7, tail], "labels": [-100, -100, -100, tail]} for tail in (8, 9, 10)
    ]
    status, out, _ = inspect([{"passes": passes}], "--train_on=[0, 2]")
    assert status == 0
    assert [f"turn {number}" in out for number in range(3)] == [True, False, True]
    with pytest.raises(SystemExit):
        inspect(CHATS, "--train_on=first")
    assert "train_on must be 'all', 'last' or a list" in capsys.readouterr().err


def test_rows_of_passes_say_context_once(inspect):
    row = {"passes": [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}]}
    _, out, _ = inspect([row])
    assert out.count("context") == 1
    assert "completion  1 token at 2..2  trained" in out
