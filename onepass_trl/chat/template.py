"""A tokenizer's chat template, and what it writes for a list of messages."""

from __future__ import annotations

import logging
import marshal
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from jinja2.exceptions import TemplateError

from onepass_trl.chat.errors import ChatFormatError, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments of apply_chat_template that aren't the caller's to choose here.
RESERVED = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
THINKING_SWITCHES = ("enable_thinking", "thinking")
_EMPTY_QUESTION = {"role": "user", "content": ""}

T = TypeVar("T")
logger = logging.getLogger(__name__)


@lru_cache(maxsize=16)
def _report_unread(template: str, names: tuple[str, ...]) -> None:
    """Log, once for each template, that these arguments change nothing."""
    logger.warning(
        "chat_template_kwargs has %s, which this chat template doesn't read: it changes nothing. "
        "Is it spelled as the template has it? Its thinking switch is %s",
        ", ".join(map(repr, names)),
        _switch(template) or "none",
    )


def _switch(template: str) -> str | None:
    return next((name for name in THINKING_SWITCHES if _names(template, name)), None)


@lru_cache(maxsize=256)
def _names(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


# For each tokenizer, by what its templates are rendered from: what was found out by rendering.
_FACTS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[bytes, dict[str, Any]]] = (
    WeakKeyDictionary()
)
_MOST_FACTS = 64


def _facts_of(
    tokenizer: PreTrainedTokenizerBase, text: str, tools: list[Any] | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the facts of a template by name, one dict for all conversations rendered alike.

    It is an empty dict where that can't be told: for tools or arguments that aren't plain data,
    such as functions, and for templates that write the time.
    """
    if _names(text, "strftime_now"):
        return {}
    try:
        # This tells apart what templates can: the order of keys, lists and tuples, 1 and True.
        # Version 2 is the last in which equal data always gives equal bytes.
        key = marshal.dumps((text, tools, kwargs, tokenizer.special_tokens_map), 2)
    except ValueError:
        return {}
    known = _FACTS.setdefault(tokenizer, {})
    if key not in known and len(known) >= _MOST_FACTS:
        del known[next(iter(known))]
    return known.setdefault(key, {})


class Template:
    """The chat template that a tokenizer uses for given tools and template arguments.

    Attributes:
        text: The Jinja source of the template.
        tools: The tools, or None.

    Raises:
        ChatFormatError: if the tokenizer has no chat template, or a template argument is reserved.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self.tools = None if tools is None else list(tools)
        self._kwargs = dict(kwargs or {})
        reserved = sorted(RESERVED & self._kwargs.keys())
        if reserved:
            raise ChatFormatError(
                f"chat_template_kwargs must not set {', '.join(reserved)}: rendering decides it; "
                "remove it"
            )
        try:
            self.text: str = tokenizer.get_chat_template(
                self._kwargs.get("chat_template"), tools=self.tools
            )
        except ValueError as error:
            raise ChatFormatError(
                f"the tokenizer has no chat template to render with ({error}); set "
                "tokenizer.chat_template"
            ) from error
        unread = [
            name for name in self._kwargs if name != "chat_template" and not _names(self.text, name)
        ]
        if unread:
            _report_unread(self.text, tuple(unread))
        self._facts = _facts_of(tokenizer, self.text, self.tools, self._kwargs)

    def _fact(self, name: str, find: Callable[[], T]) -> T:
        """Return a fact of the template, found once."""
        if name not in self._facts:
            self._facts[name] = find()
        fact: T = self._facts[name]
        return fact

    def names(self, name: str) -> bool:
        """Return whether the template's source has this name."""
        return _names(self.text, name)

    @property
    def closing(self) -> str:
        """The token with which the template ends a whole conversation, ``""`` if there is none.

        Phi-3's writes ``<|endoftext|>`` even behind a question that awaits its answer. Such a token
        isn't part of a turn: no later context holds it.
        """
        eos = self._tokenizer.eos_token
        if not eos or not self.question.endswith(eos):
            return ""
        return "" if self.question_prompt.startswith(self.question) else eos

    @property
    def question(self) -> str:
        """What the template writes for an empty question."""
        return self._fact("question", lambda: self.render([_EMPTY_QUESTION], prompt=False))

    @property
    def question_prompt(self) -> str:
        """What inference feeds for an empty question."""
        return self._fact("question_prompt", lambda: self.render([_EMPTY_QUESTION], prompt=True))

    @property
    def thinking_switch(self) -> str | None:
        """The template argument that turns thinking on and off, None if it has none."""
        return _switch(self.text)

    @property
    def takes_text_arguments(self) -> bool:
        """Whether arguments of tool calls must be JSON text: DeepSeek fails for dicts."""

        def refuses(arguments: Any) -> bool:
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                self.render_behind_question(message)
            except TemplateRefusal:
                return True
            return False

        return self._fact(
            "takes_text_arguments", lambda: refuses({"a": "b"}) and not refuses('{"a": "b"}')
        )

    def render_behind_question(self, message: dict[str, Any]) -> str:
        """Return the text of an empty question and an assistant's message."""
        return self.render([_EMPTY_QUESTION, message], prompt=False)

    def render(self, messages: Sequence[dict[str, Any]], *, prompt: bool) -> str:
        """Return the text of the messages, with the generation prompt after it if ``prompt``.

        Raises:
            TemplateRefusal: if the template raises an error for these messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=self.tools,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise TemplateRefusal(str(error)) from error
        assert isinstance(text, str)
        return text
