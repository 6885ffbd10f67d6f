"""Records of one sequence: what is read, what is refused."""

import copy

import pytest

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.preparation import sequences
from onepass_trl.preparation.loading import load_conversations
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import render_record
from onepass_trl.preparation.sequences import sequence_of

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read(record, tokenizer, **options):
    return sequence_of(record, tokenizer, PreparationOptions(**options))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"messages": CHAT, "text": "the same, rendered"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"id": 3},
    ],
)
def test_conversations_are_no_sequences(record, tiny_tokenizer):
    assert read(record, tiny_tokenizer) is None


def test_text_ends_once(tiny_tokenizer):
    end = tiny_tokenizer.eos_token
    once, twice = (read({"text": text}, tiny_tokenizer) for text in ("a b", f"a b{end}"))
    assert once.token_ids.tolist() == twice.token_ids.tolist()
    assert once.token_ids[-1] == tiny_tokenizer.eos_token_id
    assert once.trained.tolist() == [False, *[True] * (len(once) - 1)]


def test_a_mask_that_is_not_used_is_said_once(tiny_tokenizer, caplog):
    sequences._warn_of_unused_mask.cache_clear()
    record = {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}
    for _ in range(2):
        assert read(record, tiny_tokenizer).num_trained == 2
    assert caplog.text.count("completion_mask") == 1
    assert read(record, tiny_tokenizer, completion_only_loss=True).num_trained == 1


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (
            {"text": "a"},
            dict(completion_only_loss=True),
            "plain text in column 'text', of which no part is a completion",
        ),
        (
            {"input_ids": [1, 2], "labels": [1, 2, 3]},
            {},
            "'input_ids' has 2 tokens and 'labels' 3: they need one value for each token",
        ),
        ({"input_ids": [1, 2], "completion_mask": [1]}, {}, "'completion_mask' 1"),
        ({"input_ids": [1, 2], "labels": [2, 0]}, {}, "label at index 0 is 2, expected -100 or"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, {}, "nothing in the sequence of 2 tokens"),
        ({"input_ids": [1]}, {}, "the sequence is a single token"),
        ({"text": ""}, {}, "the sequence is a single token"),  # its end
        ({"text": 5}, {}, "column 'text' must be text, got int: '5'"),
        ({"text": ["a", "b"]}, {}, "column 'text' must be text, got list"),
        ({"input_ids": []}, {}, "the sequence has no token"),
        ({"input_ids": [1.5, 2]}, {}, "column 'input_ids' must be a list of whole numbers"),
        ({"input_ids": "1 2"}, {}, "column 'input_ids' must be a list of whole numbers"),
        ({"input_ids": [1, -2]}, {}, "token ids must not be negative"),
        ({"input_ids": [1, 2], "messages": CHAT}, {}, "remove the one that is not meant"),
        ({"prompt": "a", "completion": CHAT[1:]}, {}, "'completion' must be text too"),
        ({"prompt": "a", "completion": "b", "text": "c"}, {}, "remove what is not meant"),
    ],
)
def test_what_cannot_be_read_is_an_error(record, options, message, tiny_tokenizer):
    with pytest.raises(ChatFormatError, match=message):
        read(record, tiny_tokenizer, **options)


def test_a_text_that_could_not_end_is_an_error(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ChatFormatError, match="no end-of-sequence token"):
        read({"text": "a"}, tokenizer)


def test_a_loss_on_what_the_user_wrote_is_for_sequences_only(tiny_tokenizer):
    options = PreparationOptions(completion_only_loss=False)
    with pytest.raises(ChatFormatError, match="completion_only_loss=False asks for a loss on what"):
        render_record({"messages": CHAT}, tiny_tokenizer, options)
    sequence = {"prompt": "a b", "completion": "c"}
    [pass_] = render_record(sequence, tiny_tokenizer, options).passes
    assert pass_.num_trained == len(pass_) - 1


def test_token_ids_of_a_file_of_json_lines(tmp_path, tiny_tokenizer):
    """Files are read exactly: their lists come as JSON text."""
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}\n')
    [record] = load_conversations(str(path))
    [pass_] = render_record(record, tiny_tokenizer).passes
    assert pass_.token_ids.tolist() == [5, 6, 7]
    assert pass_.trained.tolist() == [False, False, True]
