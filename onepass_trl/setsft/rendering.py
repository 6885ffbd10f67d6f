"""Questions and their completions as traces, and the prompts with which inference asks for them.

The forking token replaces the template's thinking opener, wherever that is: at the end of the
prompt (DeepSeek-R1) or at the beginning of the completion (Qwen3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onepass_trl.chat.encoding import Ids, added_tokens, encode_after, encode_alone
from onepass_trl.chat.errors import ChatFormatError, errors_named
from onepass_trl.chat.families import family_of
from onepass_trl.chat.processing import ProcessingClass, tokenizer_of
from onepass_trl.chat.records import QUESTIONS, read_question
from onepass_trl.chat.rendering import RenderedTurn, render_answers
from onepass_trl.chat.template import Template
from onepass_trl.chat.turns import InvalidTurn, TurnTexts, valid
from onepass_trl.passes import Pass
from onepass_trl.preparation.nulls import read_record
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.round_trip import check_round_trip
from onepass_trl.preparation.sequences import with_end
from onepass_trl.setsft.tokens import (
    DEFAULT_FORMAT,
    find_thinking_opener,
    forking_token_ids,
    forking_tokens,
)
from onepass_trl.setsft.traces import Trace

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ForkingTokens:
    """The forking tokens of a run and what they replace.

    Attributes:
        names: as text.
        ids: as the tokenizer has them.
        opener: the thinking opener that they replace; "" if they replace nothing.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    opener: str

    @classmethod
    def of(
        cls,
        tokenizer: ProcessingClass,
        num_forking_tokens: int,
        forking_token_format: str = DEFAULT_FORMAT,
        thinking_opener: str | None = None,
    ) -> ForkingTokens:
        """Return the forking tokens of a tokenizer that has them.

        Raises:
            ValueError: if it doesn't have them, or has no thinking opener.
        """
        names = forking_tokens(num_forking_tokens, forking_token_format)
        ids = forking_token_ids(tokenizer_of(tokenizer), names)
        opener = find_thinking_opener(tokenizer) if thinking_opener is None else thinking_opener
        return cls(tuple(names), tuple(ids), opener)


@dataclass(frozen=True)
class _Parts:
    """The text of a turn around its forking token.

    Attributes:
        before: the prompt up to the forking token.
        between: the white space that follows it in the prompt.
        completion: what the model must generate.
    """

    before: str
    between: str
    completion: str


def render_traces(
    record: Mapping[str, Any],
    tokenizer: ProcessingClass,
    tokens: ForkingTokens,
    options: PreparationOptions,
    *,
    features: Features | None = None,
    verify: bool = False,
) -> list[Trace]:
    """Return the traces of a dataset's record, one for each of its completions.

    Args:
        record: a question and its completions, see `onepass_trl.chat.records.read_question`. To a
            completion of a text prompt the end-of-sequence token is added if it doesn't end in it.
        tokenizer: the tokenizer or processor, with the forking tokens.
        tokens: the forking tokens.
        options: how messages are rendered.
        features: of the dataset, see `onepass_trl.preparation.nulls.read_record`.
        verify: also parse the messages back, see `onepass_trl.preparation.round_trip`.

    Raises:
        ChatFormatError: if the record can't be read or rendered, a completion has no thinking
            opener, or parsing gives another message; the message names the completion.
    """
    record = read_record(
        record,
        features,
        options.null_arguments,
        forms=QUESTIONS,
        ignored=options.ignored_columns,
    )
    question = read_question(record)
    turns: Sequence[TurnTexts | InvalidTurn] = ()
    if not isinstance(question.prompt, str):
        turns = render_answers(
            question.prompt,
            question.completions,
            tokenizer,
            tools=question.tools,
            chat_template_kwargs={
                **(options.chat_template_kwargs or {}),
                **question.chat_template_kwargs,
            },
        )
    encoder = _Encoder(tokenizer_of(tokenizer), isinstance(question.prompt, str))
    traces = []
    for number, completion in enumerate(question.completions):
        with errors_named(f"completion {number} of {len(question.completions)}"):
            if isinstance(question.prompt, str):
                parts = _text_parts(question.prompt, completion, encoder.tokenizer, tokens.opener)
            else:
                turn = valid(turns[number])
                if verify:
                    pass_ = encoder.encode(turn.context, turn.completion)
                    rendered = RenderedTurn(**vars(turn), rendered=pass_)
                    check_round_trip(rendered, tokenizer, options.known_templates)
                parts = _split(turn.context, turn.completion, tokens.opener)
            traces.append(_to_trace(parts, number, tokens, encoder))
    return traces


def forking_prompts(
    prompt: str | Sequence[Mapping[str, Any]],
    tokenizer: ProcessingClass,
    num_forking_tokens: int,
    *,
    forking_token_format: str = DEFAULT_FORMAT,
    thinking_opener: str | None = None,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tokenize: bool = True,
) -> list[Any]:
    """Return one prompt for each forking token, exactly as training had it.

    Args:
        prompt: messages that end before the turn to generate, or text.
        tokenizer: the tokenizer or processor that was saved with the model.
        num_forking_tokens: K.
        forking_token_format: as in training.
        thinking_opener: as in training.
        tools: as for ``apply_chat_template``.
        chat_template_kwargs: further arguments of the template.
        tokenize: return lists of token ids; else strings, to be tokenized without adding special
            tokens where `prompt` is messages, and with them where it is text.

    Raises:
        ValueError: if the tokenizer lacks a forking token, or the prompt has no place for it.
    """
    tokens = ForkingTokens.of(tokenizer, num_forking_tokens, forking_token_format, thinking_opener)
    is_text = isinstance(prompt, str)
    if isinstance(prompt, str):
        parts = _text_parts(prompt, tokens.opener + "x", tokenizer_of(tokenizer), tokens.opener)
    else:
        answer = _any_answer(tokenizer, tools, chat_template_kwargs, tokens.opener)
        [turn] = render_answers(
            prompt, [answer], tokenizer, tools=tools, chat_template_kwargs=chat_template_kwargs
        )
        turn = valid(turn)
        parts = _split(turn.context, turn.completion, tokens.opener)
    _refuse_forking_tokens(parts, tokens)
    texts = [parts.before + name + parts.between for name in tokens.names]
    if not tokenize:
        return texts
    return [ids.tolist() for ids in _encode_prompts(texts, tokenizer_of(tokenizer), is_text)]


def _any_answer(
    processing_class: ProcessingClass,
    tools: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    opener: str,
) -> dict[str, str]:
    """Return an assistant message with reasoning, to see where its opener is put."""
    template = Template(processing_class, tools, kwargs)
    answer = {"role": "assistant", "content": "x"}
    if opener and family_of(template).reads_reasoning(template):
        return {**answer, "reasoning_content": "x"}
    return {**answer, "content": opener + "x"}


def _text_parts(
    prompt: str, completion: Any, tokenizer: PreTrainedTokenizerBase, opener: str
) -> _Parts:
    if not isinstance(completion, str):
        raise ChatFormatError(
            f"the prompt is text, so it must be a string, got {type(completion).__name__}: "
            f"{str(completion)[:80]!r}; convert it, or give the prompt as a list of messages"
        )
    if not completion.strip():
        raise ChatFormatError("it is empty, so there is nothing to train; remove it")
    if opener and completion[0].isspace() and completion.lstrip().startswith(opener):
        raise ChatFormatError(
            f"white space stands before its thinking opener ({completion[:40]!r}), which prompts "
            "for generation would lack; move it to the end of the prompt, or remove it"
        )
    return _split(prompt, with_end(completion, tokenizer), opener)


def _split(context: str, completion: str, opener: str) -> _Parts:
    """Return the parts of a turn around its thinking opener."""
    head = context.rstrip()
    if not opener:
        return _Parts(context, "", completion)
    if head.endswith(opener):
        return _Parts(head.removesuffix(opener), context[len(head) :], completion)
    rest = completion.lstrip()
    if rest.startswith(opener):
        lead = completion[: len(completion) - len(rest)]
        return _Parts(context + lead, "", rest.removeprefix(opener))
    raise ChatFormatError(
        f"the thinking opener {opener!r}, which the forking token replaces, is neither at the end "
        f"of the prompt ({context[-40:]!r}) nor at the beginning of the completion "
        f"({completion[:40]!r}). Give the completion reasoning, set thinking_opener to the text "
        "with which this template begins it, or to '' if there is nothing to replace"
    )


def _refuse_forking_tokens(parts: _Parts, tokens: ForkingTokens) -> None:
    for name in tokens.names:
        for what, text in (("prompt", parts.before), ("completion", parts.completion)):
            if name in text:
                raise ChatFormatError(
                    f"the {what} contains the forking token {name!r} itself: remove it from the "
                    "data, the trainer puts it in; or choose another forking_token_format"
                )


def _encode_prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, is_text: bool
) -> list[Ids]:
    """Return the ids of prompts as inference would feed them: text with the special tokens."""
    if not is_text:
        return encode_alone(tokenizer, texts)
    return [np.asarray(ids, dtype=np.int32) for ids in tokenizer(list(texts))["input_ids"]]


class _Encoder:
    """Tokenizes the traces of a record: the prompt, which they have in common, once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, is_text: bool) -> None:
        self.tokenizer = tokenizer
        self._is_text = is_text
        self._prompts: dict[str, Ids] = {}

    def encode(self, prompt: str, completion: str) -> Pass:
        """Return the pass of a prompt and a completion, which is trained."""
        if prompt not in self._prompts:
            [self._prompts[prompt]] = _encode_prompts([prompt], self.tokenizer, self._is_text)
        before = self._prompts[prompt]
        if added_tokens(self.tokenizer).prepends:
            after = encode_after(self.tokenizer, prompt, completion)
        else:
            [after] = encode_alone(self.tokenizer, [completion])
        trained = np.repeat([False, True], [before.size, after.size])
        return Pass(np.concatenate([before, after]), trained)


def _to_trace(parts: _Parts, number: int, tokens: ForkingTokens, encoder: _Encoder) -> Trace:
    _refuse_forking_tokens(parts, tokens)
    text = parts.before + tokens.names[0] + parts.between
    pass_ = encoder.encode(text, parts.completion)
    (forks,) = np.nonzero(pass_.token_ids == tokens.ids[0])
    assert forks.size == 1, (text, pass_)
    if forks[0] == 0:
        raise ChatFormatError(
            "nothing stands before the forking token, so the question is empty; give a prompt"
        )
    return Trace(pass_, int(forks[0]), number)
