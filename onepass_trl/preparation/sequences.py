"""Records of one sequence, which is one pass: text, a prompt and its completion, token ids.

They are trained as TRL's ``SFTTrainer`` trains them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from onepass_trl.chat.columns import check_columns
from onepass_trl.chat.encoding import encode_after
from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.messages import is_encodable
from onepass_trl.chat.records import CONVERSATIONS, form_of
from onepass_trl.passes import Pass
from onepass_trl.preparation.given_passes import trained_by_labels
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PER_TOKEN = ("labels", "completion_mask", "assistant_masks")
_UNUSED = ("attention_mask", "special_tokens_mask")  # what else tokenizers give


def sequence_of(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> Pass | None:
    """Return the pass of a record that holds one sequence, None if it holds a conversation.

    The forms, in plain Python:

    - ``input_ids``, with ``labels`` (-100, or the id at the same index), or with
      ``completion_mask`` and ``assistant_masks``; without them all tokens are trained
    - ``prompt`` and ``completion`` as text: the completion is trained, or everything with
      ``completion_only_loss=False``
    - text, in the column ``options.text_field``: everything is trained

    Text is tokenized as the tokenizer does it, and ends in the end-of-sequence token, which is
    added if it is not there. The first token is never trained: nothing comes before it.

    Raises:
        ChatFormatError: if the record can't be read, has several forms or nothing to train.
    """
    messages = form_of(record, CONVERSATIONS)
    if record.get("input_ids") is not None:
        if messages:
            raise ChatFormatError(
                f"the row has token ids in column 'input_ids' and a conversation in "
                f"{' and '.join(map(repr, messages))}: remove the one that is not meant"
            )
        pass_ = _of_ids(record, options)
    elif messages == ("prompt", "completion") and isinstance(record["prompt"], str):
        pass_ = _of_prompt(record, tokenizer, options)
    elif not messages and record.get(options.text_field) is not None:
        pass_ = _of_text(record[options.text_field], tokenizer, options)
    else:
        return None
    is_prompt = messages == ("prompt", "completion")
    read = messages if is_prompt else (options.text_field, "input_ids", *_PER_TOKEN, *_UNUSED)
    check_columns(record, read, None, is_whole=not is_prompt)
    if len(pass_) == 1:
        raise ChatFormatError(
            "the sequence is a single token, which nothing comes before, so nothing is trained; "
            "remove the row"
        )
    if not pass_.num_trained:
        raise ChatFormatError(
            f"nothing in the sequence of {len(pass_)} tokens is trained; remove the row, or change "
            "its labels or masks"
        )
    return pass_


def with_end(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text with the end-of-sequence token at its end, where generation stops.

    Raises:
        ChatFormatError: the tokenizer has none.
    """
    end = tokenizer.eos_token
    if not end:
        raise ChatFormatError(
            "the tokenizer has no end-of-sequence token, so a model trained on it would never "
            "learn to stop; set tokenizer.eos_token (eos_token in the configuration)"
        )
    return text if text.endswith(end) else text + end


def _of_text(text: Any, tokenizer: PreTrainedTokenizerBase, options: PreparationOptions) -> Pass:
    if not isinstance(text, str):
        raise ChatFormatError(
            f"column {options.text_field!r} must be text, got {type(text).__name__}: "
            f"{str(text)[:80]!r}; convert it, or give a conversation in the column 'messages'"
        )
    if options.completion_only_loss:
        raise ChatFormatError(
            f"the row has plain text in column {options.text_field!r}, of which no part is a "
            "completion, but completion_only_loss is True; leave it unset, or give the row a "
            "'prompt' and a 'completion'"
        )
    ids = _encoded(with_end(text, tokenizer), tokenizer)
    return _pass(ids, np.ones(ids.size, dtype=np.bool_))


def _of_prompt(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> Pass:
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(completion, str):
        raise ChatFormatError(
            "'prompt' is text, so 'completion' must be text too, got "
            f"{type(completion).__name__}: {str(completion)[:80]!r}; give both as text, or both as "
            "lists of messages"
        )
    if isinstance(record.get(options.text_field), str):
        raise ChatFormatError(
            f"the row has text in column {options.text_field!r} and in 'prompt' and 'completion': "
            "remove what is not meant"
        )
    completion = with_end(completion, tokenizer)
    before = _encoded(prompt, tokenizer)
    ids = _encoded(prompt + completion, tokenizer)
    if not np.array_equal(ids[: before.size], before):
        # Tokens merge across the seam. A server tokenizes the prompt alone.
        ids = np.concatenate([before, encode_after(tokenizer, prompt, completion)])
    trained = np.ones(ids.size, dtype=np.bool_)
    if options.completion_only_loss is not False:
        trained[: before.size] = False
    return _pass(ids, trained)


def _of_ids(record: Mapping[str, Any], options: PreparationOptions) -> Pass:
    ids = _whole_numbers(record, "input_ids")
    given = {
        column: _whole_numbers(record, column)
        for column in _PER_TOKEN
        if record.get(column) is not None
    }
    for column, values in given.items():
        if values.size != ids.size:
            raise ChatFormatError(
                f"'input_ids' has {counted(ids.size, 'token')} and {column!r} {values.size}: they "
                "need one value for each token"
            )
    if record.get("attention_mask") and not all(record["attention_mask"]):
        raise ChatFormatError(
            "'attention_mask' has zeros, which isn't supported: remove the padding, or the column"
        )
    labels = given.pop("labels", None)
    if labels is not None:
        return _pass(ids, trained_by_labels(labels, ids))
    mask = given.get("completion_mask")
    if mask is not None and options.completion_only_loss is None:
        _warn_of_unused_mask()
    if not options.completion_only_loss:
        given.pop("completion_mask", None)
    trained = np.ones(ids.size, dtype=np.bool_)
    for values in given.values():
        trained &= values.astype(np.bool_)
    return _pass(ids, trained)


@cache
def _warn_of_unused_mask() -> None:
    logger.warning(
        "the dataset has a 'completion_mask', which is not used, as in SFTTrainer, unless "
        "completion_only_loss=True; set it to True or False to say which you mean"
    )


def _whole_numbers(record: Mapping[str, Any], column: str) -> np.ndarray:
    try:
        values = np.asarray(record[column])
    except ValueError as error:  # lists of different lengths
        raise ChatFormatError(
            f"column {column!r} must be a list of whole numbers: {error}"
        ) from error
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iub"):
        raise ChatFormatError(
            f"column {column!r} must be a list of whole numbers, got {str(record[column])[:80]!r}"
        )
    return values.astype(np.int64)


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the ids of a text, with the special tokens that the tokenizer adds."""
    if not is_encodable(text):
        raise ChatFormatError(
            "the text has an unpaired surrogate, which no tokenizer encodes; remove it"
        )
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def _pass(ids: np.ndarray, trained: np.ndarray) -> Pass:
    if not ids.size:
        raise ChatFormatError("the sequence has no token; remove the row")
    trained[0] = False
    try:
        return Pass(ids, trained)
    except ValueError as error:
        raise ChatFormatError(str(error)) from error
