"""Questions and their completions as traces, and the prompts with which inference asks for them.

The forking token replaces the template's thinking opener, wherever that stands: at the end of the
prompt (DeepSeek-R1) or at the begin of the completion (Qwen3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onepass_trl.chat import ChatFormatError, RenderedTurn, row_to_conversation
from onepass_trl.chat.encoding import Ids, added_tokens, encode_alone, encode_behind
from onepass_trl.chat.families import family_of
from onepass_trl.chat.rendering import AnswerRenderer, TurnTexts
from onepass_trl.chat.rows import NullArguments
from onepass_trl.chat.template import Template
from onepass_trl.passes import Pass
from onepass_trl.preparation.round_trip import (
    KnownTemplates,
    check_round_trip,
    no_response_template,
)
from onepass_trl.setsft.tokens import (
    DEFAULT_FORMAT,
    find_thinking_opener,
    forking_token_ids,
    forking_tokens,
)
from onepass_trl.setsft.traces import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLUMNS = ("prompt", "completions")


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
        tokenizer: PreTrainedTokenizerBase,
        num_forking_tokens: int,
        forking_token_format: str = DEFAULT_FORMAT,
        thinking_opener: str | None = None,
    ) -> ForkingTokens:
        """Return the forking tokens of a tokenizer that has them.

        Raises:
            ValueError: if it doesn't have them, or has no thinking opener.
        """
        names = forking_tokens(num_forking_tokens, forking_token_format)
        ids = forking_token_ids(tokenizer, names)
        opener = find_thinking_opener(tokenizer) if thinking_opener is None else thinking_opener
        return cls(tuple(names), tuple(ids), opener)


@dataclass(frozen=True)
class _Parts:
    """The text of a turn around its forking token.

    Attributes:
        before: what stands before the forking token.
        between: what the prompt has behind it: white space.
        completion: what the model must generate behind that.
    """

    before: str
    between: str
    completion: str


def row_to_traces(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    tokens: ForkingTokens,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    null_arguments: NullArguments = "error",
    verify: bool = False,
    known_templates: KnownTemplates = no_response_template,
) -> list[Trace]:
    """Return the traces of a dataset row, one for each of its completions.

    Args:
        row: ``prompt``, a list of messages or text, and ``completions``, a list of assistant
            messages with reasoning (each as itself or as a list of one), or of strings. With a
            prompt of messages a string is the content of an assistant message; with a text prompt
            it is the text itself, behind which the end-of-sequence token is added if it doesn't
            stand there. ``system`` (beside messages), ``tools`` and ``chat_template_kwargs`` may
            stand beside them. Lists may be given as JSON text.
        tokenizer: the tokenizer, with the forking tokens.
        tokens: the forking tokens.
        chat_template_kwargs: further arguments of the template; the row's own come first.
        null_arguments: as for `onepass_trl.chat.row_to_conversation`.
        verify: also parse the messages back, see `onepass_trl.preparation.round_trip`.
        known_templates: how they are parsed, where the tokenizer doesn't say it.

    Raises:
        ChatFormatError: if the row can't be read or rendered, a completion has no thinking opener,
            or parsing gives another message; the message names the completion.
    """
    missing = [column for column in _COLUMNS if row.get(column) is None]
    if missing:
        given = [repr(name) for name, value in row.items() if value is not None]
        raise ChatFormatError(
            "a row for set fine-tuning needs 'prompt' (messages or text) and 'completions' (a list "
            f"of assistant messages or strings); this one has no {' and no '.join(missing)}, only "
            f"{', '.join(given) or 'nothing'}. Rename or convert the columns"
        )
    prompt, completions = (_from_json_text(row[column]) for column in _COLUMNS)
    if isinstance(row["prompt"], str) and not all(isinstance(m, Mapping) for m in prompt):
        prompt = row["prompt"]  # text that happens to be a JSON list
    if isinstance(prompt, str) and row.get("system"):
        raise ChatFormatError(
            "the row has a 'system' column, and a prompt of text has no place for it: write it "
            "into the prompt, or give the prompt as a list of messages"
        )
    if not isinstance(completions, (list, tuple)) or not completions:
        raise ChatFormatError(
            "'completions' must be a list with at least one assistant message or string, got "
            f"{str(completions)[:80]!r}: give the row a trace, or remove it"
        )
    settings = {name: row.get(name) for name in ("system", "tools", "chat_template_kwargs")}
    answers = _Answers(
        {**settings, "prompt": row["prompt"]}, tokenizer, chat_template_kwargs, null_arguments
    )
    encoder = _Encoder(tokenizer, isinstance(prompt, str))
    traces = []
    for number, completion in enumerate(completions):
        try:
            if isinstance(prompt, str):
                parts = _text_parts(prompt, completion, tokenizer, tokens.opener)
            else:
                answer: Any = [_as_message(completion)]
                if isinstance(row["completions"], str):
                    answer = json.dumps(answer)  # in JSON text, nulls are real
                turn = answers.render(answer)
                if verify:
                    pass_ = encoder.encode(turn.context, turn.completion)
                    rendered = RenderedTurn(**vars(turn), rendered=pass_)
                    check_round_trip(rendered, tokenizer, known_templates)
                parts = _split(turn.context, turn.completion, tokens.opener)
            traces.append(_to_trace(parts, number, tokens, encoder))
        except ChatFormatError as error:
            raise ChatFormatError(f"completion {number} of {len(completions)}: {error}") from error
    return traces


def forking_prompts(
    prompt: str | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
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
        tokenizer: the tokenizer that was saved with the model.
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
        parts = _text_parts(prompt, tokens.opener + "x", tokenizer, tokens.opener)
    else:
        answer = _any_answer(tokenizer, tools, chat_template_kwargs, tokens.opener)
        row = {"prompt": prompt, "tools": tools}
        turn = _Answers(row, tokenizer, chat_template_kwargs, "keep").render([answer])
        parts = _split(turn.context, turn.completion, tokens.opener)
    _refuse_forking_tokens(parts, tokens)
    texts = [parts.before + name + parts.between for name in tokens.names]
    if not tokenize:
        return texts
    return [ids.tolist() for ids in _encode_prompts(texts, tokenizer, is_text)]


def _any_answer(
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    opener: str,
) -> dict[str, str]:
    """Return an assistant message with reasoning, to see where its opener stands."""
    template = Template(tokenizer, tools, kwargs).text
    answer = {"role": "assistant", "content": "x"}
    if opener and family_of(template).reads_reasoning(template):
        return {**answer, "reasoning_content": "x"}
    return {**answer, "content": opener + "x"}


def _from_json_text(value: Any) -> Any:
    """Return the list that a column holds as JSON text, or the value itself."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            pass  # text that begins with a bracket
    return value


def _as_message(completion: Any) -> Mapping[str, Any]:
    if isinstance(completion, (list, tuple)) and len(completion) == 1:
        completion = completion[0]
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion}
    if isinstance(completion, Mapping) and completion.get("role") == "assistant":
        return completion
    raise ChatFormatError(
        f"it must be one assistant message or a string, got {str(completion)[:80]!r}: earlier "
        "turns belong into 'prompt'"
    )


class _Answers:
    """Renders the completions of a row with a prompt of messages, and the prompt only once."""

    def __init__(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None,
        null_arguments: NullArguments,
    ) -> None:
        self._row = row
        self._tokenizer = tokenizer
        self._kwargs = chat_template_kwargs or {}
        self._null_arguments = null_arguments
        self._renderer: AnswerRenderer | None = None

    def render(self, completion: Any) -> TurnTexts:
        """Return the turn of a completion: a list of one message, or the JSON text of one."""
        conversation = row_to_conversation(
            {**self._row, "completion": completion}, null_arguments=self._null_arguments
        )
        *before, answer = conversation.messages
        if self._renderer is None:
            self._renderer = AnswerRenderer(
                before,
                self._tokenizer,
                tools=conversation.tools,
                chat_template_kwargs={**self._kwargs, **conversation.chat_template_kwargs},
            )
        return self._renderer.render(answer)


def _text_parts(
    prompt: str, completion: Any, tokenizer: PreTrainedTokenizerBase, opener: str
) -> _Parts:
    if not isinstance(completion, str):
        raise ChatFormatError(
            f"the prompt is text, so it must be a string, got {str(completion)[:80]!r}; give the "
            "prompt as a list of messages"
        )
    if not completion.strip():
        raise ChatFormatError("it is empty, so there is nothing to train; remove it")
    if opener and completion[0].isspace() and completion.lstrip().startswith(opener):
        raise ChatFormatError(
            f"white space stands before its thinking opener ({completion[:40]!r}), which prompts "
            "for generation would lack; move it to the end of the prompt, or remove it"
        )
    eos = tokenizer.eos_token
    if not eos:
        raise ChatFormatError(
            "the tokenizer has no end-of-sequence token, so a model trained on it would never "
            "learn to stop; set tokenizer.eos_token (eos_token in the configuration)"
        )
    return _split(prompt, completion if completion.endswith(eos) else completion + eos, opener)


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
        f"the thinking opener {opener!r}, which the forking token replaces, stands neither at the "
        f"end of the prompt ({context[-40:]!r}) nor at the begin of the completion "
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
    """Tokenizes the traces of a row: the prompt, which they have in common, once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, is_text: bool) -> None:
        self._tokenizer = tokenizer
        self._is_text = is_text
        self._prompts: dict[str, Ids] = {}

    def encode(self, prompt: str, completion: str) -> Pass:
        """Return the pass of a prompt and a completion, which is trained."""
        if prompt not in self._prompts:
            [self._prompts[prompt]] = _encode_prompts([prompt], self._tokenizer, self._is_text)
        before = self._prompts[prompt]
        if added_tokens(self._tokenizer).prepends:
            behind = encode_behind(self._tokenizer, prompt, completion)
        else:
            [behind] = encode_alone(self._tokenizer, [completion])
        trained = np.repeat([False, True], [before.size, behind.size])
        return Pass(np.concatenate([before, behind]), trained)


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
