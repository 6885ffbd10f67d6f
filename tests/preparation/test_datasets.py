"""What becomes of a dataset: rows, what is left out and reported, what is an error."""

import json
import logging

import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, Json, List, Value

from onepass_trl.preparation.datasets import prepare_dataset
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import ROW_FEATURES, RowMaker
from tests.chat.tokenizers import small_tokenizer
from tests.conversations import as_record, random_chat
from tests.training.conversations import CONVERSATIONS, RECORDS

QUESTION = {"role": "user", "content": "2+2?"}
GOOD = {"messages": [QUESTION, {"role": "assistant", "content": "4"}]}
BAD = [
    {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "4<|im_end|>"},
            {"role": "user", "content": "3+3?"},
            {"role": "assistant", "content": "6"},
        ]
    },
    {"messages": [{"role": "user", "content": "Hi"}]},
    GOOD,
]


def prepare(records, **options):
    dataset = Dataset.from_list(records) if isinstance(records, list) else records
    maker = RowMaker(small_tokenizer("qwen3"), PreparationOptions(**options))
    return prepare_dataset(dataset, dataset.column_names, maker, "train")


def test_what_overflow_loses_is_counted(caplog):
    longest = max(len(pass_) for conversation in CONVERSATIONS for pass_ in conversation)
    long_turns = [len(p) for c in CONVERSATIONS for p in c if len(p) > longest // 2]
    with caplog.at_level(logging.WARNING):
        prepare(RECORDS, max_length=longest // 2, overflow="drop")
    assert (
        f"train dataset: {len(long_turns)} turns are longer than max_length={longest // 2} (the "
        f"longest with its context: {longest} tokens)" in caplog.text
    )
    assert f"{len(long_turns)} turns whole" in caplog.text
    with pytest.raises(
        ValueError, match=r"row \d of the train dataset: pass \d .* tokens, but max_length is"
    ):
        prepare(RECORDS, max_length=longest // 2, overflow="error")
    with pytest.raises(ValueError, match=r"no row left to train: .* turns are longer than max_"):
        prepare(RECORDS, max_length=2, overflow="drop")


def test_a_conversation_that_overflows_whole_leaves_the_others():
    short = [random_chat(1, seed=9, low=1, high=3)]
    records = [as_record(passes) for passes in [CONVERSATIONS[0], *short]]
    rows = prepare(records, max_length=12, overflow="drop")
    assert [int(row["num_turns"]) for row in rows] == [1]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": 3}], "column 'text' must be text, got int"),
        ([{"prompt": "a", "completion": [QUESTION]}], "'completion' must be text too"),
        ([{"question": "hello"}], "question"),
        (
            [{"messages": [QUESTION], "image": "x.png"}],
            "image 0 of column 'image': there is no file",
        ),
        ([{"messages": [QUESTION]}], "row 0 of the train dataset.*assistant"),
        (
            [*RECORDS, {"passes": [{"input_ids": [1, 2], "labels": [-100, 3]}]}],
            "row 6 of the train dataset",
        ),
    ],
    ids=["text", "plain_prompt", "unknown", "vision", "no_assistant", "label"],
)
def test_records_that_cannot_be_trained_are_errors(records, message):
    with pytest.raises(ValueError, match=message):
        prepare(records)


def test_prepared_rows_are_taken_as_they_are():
    rows = prepare(RECORDS)
    assert rows.column_names == [*ROW_FEATURES, "labels"]
    assert [row["visible_end"].tolist() for row in prepare(rows)] == [
        row["visible_end"].tolist() for row in rows
    ]


def test_prepared_rows_have_labels_for_others_and_need_none():
    rows = prepare(RECORDS)
    for row in rows:
        trained = row["labels"] != -100
        assert (row["labels"] == row["input_ids"])[trained].all()
        assert trained.sum() == (row["weights"] > 0).sum() > 0
    bare = rows.remove_columns("labels")
    assert "labels" not in prepare(bare).column_names
    assert "labels" not in next(iter(prepare(bare.to_iterable_dataset())))
    [packed] = prepare(bare, packing=True, max_length=10_000)
    assert (packed["labels"] != -100).sum() == (packed["weights"] > 0).sum()


def test_prepared_rows_obey_the_options():
    rows = prepare(RECORDS)
    packed = prepare(rows, packing=True, max_length=300)
    assert len(packed) < len(rows)
    assert sum(row["num_turns"] for row in packed) == sum(row["num_turns"] for row in rows)
    with pytest.raises(ValueError, match=r"prepared train dataset has .* max_length is 8"):
        prepare(rows, max_length=8)
    stream = rows.to_iterable_dataset()
    assert len(list(prepare(stream, max_length=300))) == len(rows)
    with pytest.raises(ValueError, match=r"prepared train dataset has .* max_length is 8"):
        next(iter(prepare(stream, max_length=8)))


def test_a_subset_of_prepared_rows_is_checked_alone():
    rows = prepare(RECORDS)
    shortest = min(len(row["input_ids"]) for row in rows)
    subset = rows.filter(lambda row: len(row["input_ids"]) == shortest)
    assert len(prepare(subset, max_length=shortest)) == len(subset)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("weights", lambda values: values[:1], "has 1 value of weights and .* of input_ids"),
        ("weights", lambda values: [-w for w in values], r"has weights\[\d+\] = -1.0, expected a "),
        (
            "shift_labels",
            lambda values: [-5] * len(values),
            r"has shift_labels\[0\] = -5, expected",
        ),
        ("visible_end", lambda values: [0] * len(values), r"has visible_end\[0\] = 0, expected a"),
        ("position_ids", lambda values: None, "has position_ids = None, expected a list"),
    ],
)
def test_a_prepared_row_that_no_tree_has_is_named(column, change, message):
    rows = [{key: np.asarray(row[key]).tolist() for key in row} for row in prepare(RECORDS)]
    rows[1] = {**rows[1], column: change(rows[1][column])}
    given = Dataset.from_list(rows)
    name = "row 1 of the prepared train dataset"
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        prepare(given)
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        list(prepare(given.to_iterable_dataset()))


def test_prepared_rows_that_became_text_are_named():
    rows = [{key: str(row[key]) for key in row} for row in prepare(RECORDS)]
    with pytest.raises(ValueError, match="'input_ids' of the prepared train dataset is text"):
        prepare(rows)


def test_a_dataset_with_a_transform_is_an_error():
    with pytest.raises(ValueError, match="the train dataset has a transform"):
        prepare(Dataset.from_list(RECORDS).with_transform(dict))


@pytest.mark.parametrize("streaming", [False, True])
def test_invalid_turns_are_left_out_where_asked(streaming, caplog):
    dataset = Dataset.from_list(BAD)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"row 0 of the train dataset: assistant turn 0 .*special"):
        next(iter(prepare(dataset)))
    rows = prepare(dataset, invalid_turns="drop")
    assert isinstance(rows, IterableDataset) == streaming
    assert [int(row["num_turns"]) for row in rows] == [1, 1]
    assert set(next(iter(rows))) == {*ROW_FEATURES, "labels"}
    assert "row 0: assistant turn 0 (message 1, template family composable)" in caplog.text
    assert "row 1: the conversation has 1 message, none from the assistant" in caplog.text
    assert ("of 2 turns or rows, which are left out" in caplog.text) != streaming


def test_what_is_reported_comes_from_the_cache_too(caplog, monkeypatch, tmp_path):
    Dataset.from_list(BAD).to_parquet(tmp_path / "bad.parquet")

    def prepared():
        dataset = Dataset.from_parquet(
            str(tmp_path / "bad.parquet"), cache_dir=str(tmp_path / "cache")
        )
        caplog.clear()
        rows = prepare(dataset, invalid_turns="drop")
        assert "of 2 turns or rows, which are left out" in caplog.text
        return [row["input_ids"].tolist() for row in rows]

    first = prepared()
    monkeypatch.setattr(RowMaker, "make", lambda *_: pytest.fail("rows are made again"))
    assert prepared() == first


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_which_nothing_is_left_is_an_error(streaming):
    invalid, long = Dataset.from_list(BAD[1:2]), Dataset.from_list(RECORDS)
    if streaming:
        invalid, long = invalid.to_iterable_dataset(), long.to_iterable_dataset()
    reasons = (
        ("all turns are invalid$", "all turns are invalid, or longer than max_length=2: raise it")
        if streaming
        else ("no exact pass can be made of 1 ", "18 turns are longer than max_length=2")
    )
    with pytest.raises(ValueError, match=f"no row left to train: {reasons[0]}"):
        prepare(invalid, invalid_turns="drop")
    with pytest.raises(ValueError, match=f"no row left to train: {reasons[1]}"):
        prepare(long, max_length=2, overflow="drop")


def test_nulls_of_a_tool_schema_survive_unless_a_struct_filled_them():
    tool = {"name": "f", "parameters": {"default": None}}
    other = {"name": "g", "parameters": {"limit": 1}}
    records = [{**GOOD, "tools": [tool]}, {**GOOD, "tools": [other]}]
    message = {"role": Value("string"), "content": Value("string")}
    exact = Features({"messages": List(message), "tools": List(Json())})
    for dataset, expected in [
        (Dataset.from_list(records, features=exact), '"parameters": {"default": null}'),
        (Dataset.from_list(records), '"parameters": {}'),
    ]:
        ids = prepare(dataset)[0]["input_ids"]
        assert expected in small_tokenizer("qwen3").decode(ids)


def test_nulls_among_arguments_are_what_the_options_say():
    calls = [
        {"function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"b": 2})
    ]
    records = [
        {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in calls
    ]
    filled = Dataset.from_list(records)
    with pytest.raises(ValueError, match=r"row 0 .*: message 1: tool call 0 has a null among its"):
        prepare(filled)
    kept, dropped = (prepare(filled, null_arguments=nulls)[0] for nulls in ("keep", "drop"))
    decode = small_tokenizer("qwen3").decode
    assert '{"a": 1, "b": null}' in decode(kept["input_ids"])
    assert '{"a": 1}' in decode(dropped["input_ids"])
    texts = [{"messages": json.dumps(record["messages"])} for record in records]
    assert prepare(texts)[0]["input_ids"].tolist() == dropped["input_ids"].tolist()
