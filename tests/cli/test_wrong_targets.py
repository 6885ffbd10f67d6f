"""Records that would be trained wrong end a run of `onepass-trl sft` before anything is trained."""

from __future__ import annotations

import re

import pytest

from onepass_trl import OnePassSFTTrainer
from onepass_trl.cli import main
from tests.chat.tokenizers import SHARED, SHARED_REASON
from tests.chats import write_jsonl
from tests.cli.test_endings import train_tiny

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


def chat(*messages, **columns):
    return {"messages": [QUESTION, *messages], **columns}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def sharegpt(*turns):
    return {"conversations": [{"from": "human", "value": "2+2?"}, *turns]}


WRONG = {
    "a closing mark that the reasoning quotes": (
        chat(said("<think>\nIt ends at </think>, I add.\n</think>\n\n4")),
        r"can't be told where the reasoning ends; give the reasoning as 'reasoning_content'",
    ),
    "a quoted closing mark in the field": (
        chat(said("4", reasoning_content="Not `</think>` yet.")),
        "its reasoning_content contains '</think>'",
    ),
    "answers in a row": (
        chat(said("Let me add."), said("4")),
        "the message after it is from the assistant too",
    ),
    "a call and a text": (
        sharegpt(
            {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
            {"from": "gpt", "value": "I added."},
        ),
        "the message after it is from the assistant too",
    ),
    "a mask of turns": (
        chat(ANSWER, assistant_loss_mask=[0]),
        "column 'assistant_loss_mask', which isn't read. .* give messages 'train'",
    ),
    "a switch of thinking": (
        chat(ANSWER, thinking=False),
        "column 'thinking', which isn't read. .* 'chat_template_kwargs'",
    ),
    "tools of another name": (
        chat(ANSWER, available_tools=[{"name": "add"}]),
        "column 'available_tools', which isn't read. .* in the column 'tools'",
    ),
    "other marks": (
        chat(said("<reasoning>Add.</reasoning>4")),
        "has content with '<reasoning>'.* give that as 'reasoning_content'",
    ),
    "other marks within an answer": (
        chat(said("I add.\n<thinking>\nTwo and two.\n</thinking>\n4")),
        "has content with '<thinking>'.* give that as 'reasoning_content'",
    ),
    "marks of Kimi": (
        chat(said("◁think▷Add.◁/think▷4")),
        "has content with '◁think▷'.* give that as 'reasoning_content'",
    ),
    "reasoning of another name": (
        chat(said("4", thinking_blocks=[{"type": "thinking", "thinking": "Add."}])),
        "'thinking_blocks', .*rename it to 'reasoning_content'",
    ),
    "calls of another name": (
        chat(said("I add.", function_calls=[CALL])),
        "'function_calls', .*give it as 'tool_calls'",
    ),
    "a mark in an argument": (
        chat(
            said("", tool_calls=[{"function": {"name": "say", "arguments": {"a": "</tool_call>"}}}])
        ),
        "tool call 0 contains '</tool_call>'",
    ),
    "a switch of another name": (
        chat(said("4", train_detail=[{"begin": 0}])),
        "'train_detail', .*rename it to 'train'",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_run_names_what_it_would_train_wrong(what, tiny_model_dir, tmp_path, capsys):
    record, match = WRONG[what]
    # The last record: those before it are right.
    path = write_jsonl(tmp_path / "chats.jsonl", [*[chat(ANSWER)] * 9, record])
    assert train_tiny("sft", path, tiny_model_dir, tmp_path) == 2
    error = capsys.readouterr().err
    assert "row 9 of the train dataset" in error
    assert re.search(match, error)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("what", WRONG)
def test_a_run_can_leave_it_out(what, tiny_model_dir, tmp_path, caplog):
    record, match = WRONG[what]
    path = write_jsonl(tmp_path / "chats.jsonl", [chat(ANSWER), record])
    flags = ["--invalid_turns=drop", "--verify_model=False"]
    assert train_tiny("sft", path, tiny_model_dir, tmp_path, *flags) == 0
    assert re.search(match, caplog.text)
    assert (tmp_path / "out" / "model.safetensors").exists()


# The records of the shared folder that would be trained wrong, and what the error says.
SHARED_CASES = [
    ("inline_close_quoted", 0, "its reasoning_content contains '</think>'"),
    ("ignored_columns", 0, "column 'loss_mask', which isn't read. .* give messages 'train'"),
    ("ignored_columns", 1, "column 'enable_thinking', .* 'chat_template_kwargs'"),
    ("ignored_columns", 2, "column 'system_prompt', .* in the column 'system'"),
    ("other_marks", 0, "has content with .* give that as 'reasoning_content'"),
    ("other_marks", 1, "has content with .* give that as 'reasoning_content'"),
    ("unread_keys", 0, "'reasoning_details', .*rename it to 'reasoning_content'"),
]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON)
@pytest.mark.parametrize(("name", "line", "match"), SHARED_CASES)
def test_a_run_names_each_shared_case(name, line, match, tiny_model_dir, tmp_path, capsys):
    record = (SHARED / "cases" / f"{name}.jsonl").read_text("utf-8").splitlines()[line]
    path = tmp_path / "case.jsonl"
    path.write_text(record + "\n", "utf-8")
    assert train_tiny("sft", path, tiny_model_dir, tmp_path) == 2
    assert re.search(match, capsys.readouterr().err)
    assert not (tmp_path / "out" / "model.safetensors").exists()


JOINED = (
    "<think>\nI need the tool.\n</think>\n\nLet me look.\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "X"}}\n</tool_call><|im_end|>'
)
TRAINED = [
    ("consecutive_assistant", 0, f"{JOINED}<think>\nReport it.\n</think>\n\nSunny.<|im_end|>"),
    ("consecutive_assistant", 1, f"{JOINED}<think>\n\n</think>\n\nSunny.<|im_end|>"),
    ("unread_keys", 1, "<think>\n\n</think>\n\n2<|im_end|>"),
]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON)
@pytest.mark.parametrize(("name", "line", "trained"), TRAINED)
def test_a_run_trains_what_the_other_shared_cases_mean(
    name, line, trained, tiny_model_dir, tiny_tokenizer, tmp_path, monkeypatch
):
    rows = []
    train = OnePassSFTTrainer.train

    def seen(self, *args, **kwargs):
        rows.extend(self.train_dataset)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(OnePassSFTTrainer, "train", seen)
    record = (SHARED / "cases" / f"{name}.jsonl").read_text("utf-8").splitlines()[line]
    path = tmp_path / "case.jsonl"
    path.write_text(record + "\n", "utf-8")
    assert train_tiny("sft", path, tiny_model_dir, tmp_path, "--verify_model=False") == 0
    [row] = rows
    assert tiny_tokenizer.decode([token for token in row["labels"] if token >= 0]) == trained


def test_a_column_that_changes_nothing_can_be_ignored(tiny_model_dir, tmp_path, capsys):
    labelled = [chat(ANSWER, reasoning="on", mask=[1])] * 2
    path = write_jsonl(tmp_path / "chats.jsonl", labelled)
    assert train_tiny("sft", path, tiny_model_dir, tmp_path) == 2
    assert "name it in the option ignored_columns" in capsys.readouterr().err
    ignored = ["--ignored_columns", "reasoning", "mask"]
    assert train_tiny("sft", path, tiny_model_dir, tmp_path, *ignored) == 0
    sets = [{"prompt": [QUESTION], "completions": ["4", "Four"], "reasoning": "on", "mask": [1]}]
    trained = write_jsonl(tmp_path / "sets.jsonl", sets)
    assert train_tiny("setsft", trained, tiny_model_dir, tmp_path) == 2
    assert train_tiny("setsft", trained, tiny_model_dir, tmp_path, *ignored) == 0
    model = f"--model_name_or_path={tiny_model_dir}"
    for verb in ("inspect", "verify", "estimate"):
        assert main([verb, str(path), model, *ignored]) == 0
    assert main(["verify", str(path), model]) == 2
