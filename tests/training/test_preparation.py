"""What becomes of a dataset: rows, what is left out and reported, what is an error."""

import json
import logging

import pytest
from datasets import Dataset

from onepass_trl.chat import ChatFormatError
from onepass_trl.preparation.datasets import ROW_COLUMNS
from tests.conversations import as_row, random_chat
from tests.models import make_model
from tests.training.conversations import CONVERSATIONS, ROWS, history


def test_nothing_is_cut_by_default(train, tiny_tokenizer):
    answer = {"role": "assistant", "content": "word " * 2000}
    row = {"messages": [{"role": "user", "content": "Talk."}, answer]}
    [prepared] = train(dataset=Dataset.from_list([row])).train_dataset
    assert (prepared["shift_labels"] >= 0).sum() > 2000


def test_template_arguments_reach_every_conversation(train):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": messages}]
    lengths = []
    for kwargs in (None, '{"enable_thinking": false}', {"enable_thinking": False}):
        trainer = train(
            dataset=Dataset.from_list(rows), chat_template_kwargs=kwargs, verify_rendering=True
        )
        row = trainer.train_dataset[0]
        lengths.append(int((row["weights"] > 0).sum()))
    # With thinking off, the prompt holds the empty reasoning.
    assert lengths[0] > lengths[1] == lengths[2]


def test_what_overflow_loses_is_counted(train, caplog):
    longest = max(len(pass_) for conversation in CONVERSATIONS for pass_ in conversation)
    long_turns = [len(p) for c in CONVERSATIONS for p in c if len(p) > longest // 2]
    with caplog.at_level(logging.WARNING):
        train(max_length=longest // 2, overflow="drop")
    assert (
        f"train dataset: {len(long_turns)} turns are longer than max_length={longest // 2}"
        in caplog.text
    )
    assert f"{len(long_turns)} turns whole" in caplog.text
    with pytest.raises(
        ValueError, match=r"row \d of the train dataset: pass \d .* tokens, but max_length is"
    ):
        train(max_length=longest // 2, overflow="error")
    with pytest.raises(ValueError, match="no row left to train"):
        train(max_length=2, overflow="drop")


def test_a_conversation_that_overflows_whole_leaves_the_others(train):
    short = [random_chat(1, seed=9, low=1, high=3)]
    rows = [as_row(passes) for passes in [CONVERSATIONS[0], *short]]
    trainer = train(dataset=Dataset.from_list(rows), max_length=12, overflow="drop")
    assert [int(row["num_turns"]) for row in trainer.train_dataset] == [1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "hello"}], "SFTTrainer"),
        ([{"prompt": "a", "completion": "b"}], "SFTTrainer"),
        ([{"question": "hello"}], "question"),
        ([{"messages": [{"role": "user", "content": "hi"}], "image": "x.png"}], "image"),
        (
            [{"messages": [{"role": "user", "content": "hi"}]}],
            "row 0 of the train dataset.*assistant",
        ),
        (
            [*ROWS, {"passes": [{"input_ids": [1, 2], "labels": [-100, 3]}]}],
            "row 6 of the train dataset",
        ),
    ],
    ids=["text", "plain_prompt", "unknown", "vision", "no_assistant", "label"],
)
def test_datasets_that_cannot_be_trained_are_errors(train, rows, message):
    with pytest.raises(ValueError, match=message):
        train(dataset=Dataset.from_list(rows))


def test_empty_datasets_are_errors(train):
    with pytest.raises(ValueError, match="train dataset is empty"):
        train(dataset=Dataset.from_dict({"messages": []}))
    with pytest.raises(ValueError, match="eval dataset is empty"):
        train(eval_dataset=Dataset.from_dict({"messages": []}))


def test_prepared_rows_are_taken_as_they_are(train):
    prepared = train(eval_dataset=Dataset.from_list(ROWS)).eval_dataset
    again = train(dataset=prepared).train_dataset
    assert [row["visible_end"].tolist() for row in again] == [
        row["visible_end"].tolist() for row in prepared
    ]


def test_chats_are_rendered_with_the_tokenizer(train, tiny_tokenizer):
    messages = [
        {"role": "user", "content": "Two plus two?"},
        {"role": "assistant", "reasoning_content": "Add them.", "content": "Four."},
        {"role": "user", "content": "Plus one?"},
        {"role": "assistant", "reasoning_content": "Four and one.", "content": "Five."},
    ]
    model = make_model("qwen3", vocab_size=len(tiny_tokenizer))
    forms = [
        [{"messages": messages}],
        [{"prompt": messages[:3], "completion": messages[3:]}],
        [
            {
                "messages": messages,
                "tools": json.dumps([]),
                "chat_template_kwargs": {"enable_thinking": True},
            }
        ],
    ]
    turns = [
        int(train(model=model, dataset=Dataset.from_list(rows)).train_dataset[0]["num_turns"])
        for rows in forms
    ]
    assert turns == [2, 1, 2]
    last = train(model=model, dataset=Dataset.from_list(forms[0]), train_on="last")
    assert last.train_dataset[0]["num_turns"] == 1


def test_prepared_rows_obey_the_options(train):
    prepared = train().train_dataset
    packed = train(dataset=prepared, packing=True, max_length=300).train_dataset
    assert len(packed) < len(prepared)
    assert sum(row["num_turns"] for row in packed) == sum(row["num_turns"] for row in prepared)
    with pytest.raises(ValueError, match=r"prepared train dataset has .* max_length is 8"):
        train(dataset=prepared, max_length=8)
    stream = prepared.to_iterable_dataset()
    trainer = train(dataset=stream, max_length=300, max_steps=2)
    trainer.train()
    assert len(history(trainer, "loss")) == 2
    with pytest.raises(ValueError, match=r"prepared train dataset has .* max_length is 8"):
        train(dataset=stream, max_length=8, max_steps=2).train()


BAD_ROWS = [
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4<|im_end|>"},
            {"role": "user", "content": "3+3?"},
            {"role": "assistant", "content": "6"},
        ]
    },
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_invalid_turns_are_left_out_where_asked(train, streaming, caplog):
    dataset = Dataset.from_list(BAD_ROWS)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    options = {"max_steps": 1} if streaming else {}
    with pytest.raises(ValueError, match=r"row 0 of the train dataset: assistant turn 0 .*special"):
        next(iter(train(dataset=dataset, **options).train_dataset))
    prepared = train(dataset=dataset, invalid_turns="drop", **options).train_dataset
    assert [int(row["num_turns"]) for row in prepared] == [1, 1]
    assert set(next(iter(prepared))) == set(ROW_COLUMNS)
    assert "row 0: assistant turn 0 (message 1, template family composable)" in caplog.text
    assert "row 1: none of the 1 messages is from the assistant" in caplog.text
    assert ("of 2 turns or rows, which are left out" in caplog.text) != streaming


def test_turns_that_are_read_otherwise_are_left_out_where_all_are_read(train, monkeypatch):
    def check(turn, tokenizer, known_templates):
        raise ChatFormatError(f"{turn.name}: parsing gives back another content")

    monkeypatch.setattr("onepass_trl.preparation.rows.check_round_trip", check)
    dataset = Dataset.from_list([BAD_ROWS[2]] * 2)
    with pytest.raises(ValueError, match=r"row 0 of the train dataset: .*parsing gives back"):
        train(dataset=dataset, invalid_turns="drop")  # the rows behind the first aren't read
    with pytest.raises(ValueError, match=r"no row left to train: .* of 2 turns or rows"):
        train(dataset=dataset, invalid_turns="drop", verify_rendering=True)


def test_a_dataset_of_invalid_turns_is_an_error(train):
    with pytest.raises(ValueError, match="no row left to train: no exact pass can be made of 1 "):
        train(dataset=Dataset.from_list(BAD_ROWS[1:2]), invalid_turns="drop")


def test_prepared_rows_that_became_text_are_named(train):
    rows = [{key: str(row[key]) for key in row} for row in train().train_dataset]
    with pytest.raises(ValueError, match="'input_ids' of the prepared train dataset is text"):
        train(dataset=Dataset.from_list(rows))


def test_skipping_preparation_of_conversations_is_an_error(train):
    with pytest.raises(ValueError, match="the train dataset has the columns passes and lacks inp"):
        train(dataset_kwargs={"skip_prepare_dataset": True})


def test_ids_without_an_embedding_are_errors(train):
    row = {"passes": [{"input_ids": [1, 99999], "labels": [-100, 99999]}]}
    dataset = Dataset.from_list([row])
    with pytest.raises(ValueError, match="train dataset has the token id 99999, but the model has"):
        train(dataset=dataset)
    for eval_dataset, name in ((dataset, "eval"), ({"held out": dataset}, "held out")):
        with pytest.raises(ValueError, match=f"the {name} dataset has the token id 99999"):
            train(eval_dataset=eval_dataset)


def test_a_stream_of_which_everything_is_dropped_is_an_error(train):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match="no row left to train"):
        train(dataset=stream, max_length=2, overflow="drop")


def test_nulls_of_a_tool_schema_survive_unless_a_struct_filled_them(train, tiny_tokenizer):
    from datasets import Features, Json, List, Value

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    tool = {"name": "f", "parameters": {"default": None}}
    other = {"name": "g", "parameters": {"limit": 1}}
    rows = [{"messages": messages, "tools": [tool]}, {"messages": messages, "tools": [other]}]
    message = {"role": Value("string"), "content": Value("string")}
    for dataset, expected in [
        (
            Dataset.from_list(
                rows, features=Features({"messages": List(message), "tools": List(Json())})
            ),
            '"parameters": {"default": null}',
        ),
        (Dataset.from_list(rows), '"parameters": {}'),
    ]:
        model = make_model("qwen3", vocab_size=len(tiny_tokenizer))
        ids = train(model=model, dataset=dataset).train_dataset[0]["input_ids"]
        assert expected in tiny_tokenizer.decode(ids)


def test_a_subset_of_prepared_rows_is_checked_alone(train):
    prepared = train().train_dataset
    shortest = min(len(row["input_ids"]) for row in prepared)
    subset = prepared.filter(lambda row: len(row["input_ids"]) == shortest)
    assert len(train(dataset=subset, max_length=shortest).train_dataset) == len(subset)


def test_train_on_chooses_among_given_passes(train):
    assert {int(row["num_turns"]) for row in train(train_on="last").train_dataset} == {1}
    with pytest.raises(ValueError, match="lists turn 7"):
        train(train_on="[7]")
