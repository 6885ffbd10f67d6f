"""Which datasets the trainer takes, and that its options reach their preparation."""

import pytest
from datasets import Dataset, DatasetDict

from tests.training.conversations import RECORDS, history


def test_nothing_is_cut_by_default(train):
    answer = {"role": "assistant", "content": "word " * 2000}
    record = {"messages": [{"role": "user", "content": "Talk."}, answer]}
    [prepared] = train(dataset=Dataset.from_list([record])).train_dataset
    assert (prepared["shift_labels"] >= 0).sum() > 2000


def test_template_arguments_reach_every_conversation(train):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    lengths = []
    for kwargs in (None, '{"enable_thinking": false}', {"enable_thinking": False}):
        trainer = train(
            dataset=Dataset.from_list([{"messages": messages}]),
            chat_template_kwargs=kwargs,
            verify_rendering=True,
        )
        row = trainer.train_dataset[0]
        lengths.append(int((row["weights"] > 0).sum()))
    # With thinking off, the prompt holds the empty reasoning.
    assert lengths[0] > lengths[1] == lengths[2]


def test_turns_are_parsed_back_as_trl_parses_known_templates(train, tiny_tokenizer, caplog):
    assert getattr(tiny_tokenizer, "response_template", None) is None
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    train(dataset=Dataset.from_list([{"messages": messages}]), verify_rendering=True)
    assert "aren't parsed back" not in caplog.text


def test_empty_datasets_are_errors(train):
    with pytest.raises(ValueError, match="train dataset is empty"):
        train(dataset=Dataset.from_dict({"messages": []}))
    with pytest.raises(ValueError, match="eval dataset is empty"):
        train(eval_dataset=Dataset.from_dict({"messages": []}))


def test_other_datasets_are_errors(train):
    trainer = train()
    for other in (RECORDS, {"a": Dataset.from_list(RECORDS)}):
        with pytest.raises(TypeError, match=r"test dataset must be a datasets\.Dataset or .*got "):
            trainer.predict(other)
    with pytest.raises(
        TypeError, match=r"got DatasetDict: give one of 'train', as dataset\[\.\.\]"
    ):
        trainer.predict(DatasetDict(train=Dataset.from_list(RECORDS)))
    with pytest.raises(TypeError, match=r"the eval dataset must be .* got list: make one"):
        train(eval_dataset=RECORDS)


def test_a_stream_of_prepared_rows_is_checked_as_it_is_read(train):
    stream = train().train_dataset.to_iterable_dataset()
    trainer = train(dataset=stream, max_length=300, max_steps=2)
    trainer.train()
    assert len(history(trainer, "loss")) == 2
    with pytest.raises(ValueError, match=r"prepared train dataset has .* max_length is 8"):
        train(dataset=stream, max_length=8, max_steps=2).train()


SKIP = {"skip_prepare_dataset": True}


@pytest.mark.parametrize("skip", [None, SKIP], ids=["checked", "skipped"])
def test_wrong_rows_are_named_before_anything_is_trained(train, skip):
    rows = train().train_dataset

    def changed(column, value):
        return rows.map(
            lambda row, at: {column: value(row[column])} if at == 1 else {}, with_indices=True
        )

    broadcast = changed("weights", lambda values: values[:1])
    with pytest.raises(ValueError, match="row 1 of the prepared train dataset has 1 value of wei"):
        train(dataset=broadcast, dataset_kwargs=skip)
    unknown = changed("shift_labels", lambda values: [*values[:-1], 99999])
    with pytest.raises(ValueError, match="the train dataset has the token id 99999, but the model"):
        train(dataset=unknown, dataset_kwargs=skip)
    with pytest.raises(
        ValueError, match="of the batch has 99999 among its shift_labels, but the v"
    ):
        train(dataset=unknown.to_iterable_dataset(), dataset_kwargs=skip).train()


def test_skipping_preparation_of_conversations_is_an_error(train):
    with pytest.raises(ValueError, match="the train dataset has the columns passes and lacks inp"):
        train(dataset_kwargs=SKIP)


def test_ids_without_an_embedding_are_errors(train):
    record = {"passes": [{"input_ids": [1, 99999], "labels": [-100, 99999]}]}
    dataset = Dataset.from_list([record])
    with pytest.raises(ValueError, match="train dataset has the token id 99999, but the model has"):
        train(dataset=dataset)
    for eval_dataset, name in ((dataset, "eval"), ({"held out": dataset}, "held out")):
        with pytest.raises(ValueError, match=f"the {name} dataset has the token id 99999"):
            train(eval_dataset=eval_dataset)


def test_what_is_reported_and_left_out_is_the_users_choice(train):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|im_end|>"}]
    dataset = Dataset.from_list([{"messages": messages}])
    with pytest.raises(ValueError, match="row 0 of the train dataset: assistant turn 0"):
        train(dataset=dataset)
    with pytest.raises(ValueError, match="no row left to train: no exact pass can be made of 1 "):
        train(dataset=dataset, invalid_turns="drop")
    with pytest.raises(ValueError, match="no row left to train: 18 turns are longer"):
        train(max_length=2, overflow="drop")


def test_train_on_chooses_among_given_passes(train):
    assert {int(row["num_turns"]) for row in train(train_on="last").train_dataset} == {1}
    with pytest.raises(ValueError, match="lists turn 7"):
        train(train_on="[7]")


def test_rows_are_shuffled_where_asked(train):
    ids = [
        [row["input_ids"].tolist() for row in train(shuffle_dataset=shuffle).train_dataset]
        for shuffle in (False, True)
    ]
    assert ids[0] != ids[1]
    assert sorted(ids[0]) == sorted(ids[1])
    assert len(ids[0]) == len(RECORDS)
