"""A tokenizer's chat template, and what it writes for a list of messages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from onepass_trl.chat.errors import ChatFormatError, TemplateRefusal
from onepass_trl.chat.marks import THINK_CLOSE, THINK_OPEN
from onepass_trl.chat.messages import REASONING_KEYS, is_encodable
from onepass_trl.chat.processing import ProcessingClass, find_chat_template, start_of_prompts
from onepass_trl.chat.template_source import TemplateSource, read_source
from onepass_trl.chat.views import Views, ViewsDiffer

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
Read = TypeVar("Read")

THINKING_SWITCHES = ("enable_thinking", "thinking")
_CONTENT = "stand-in for content"
_EMPTY_QUESTION = {"role": "user", "content": ""}
# What the code of a template may raise: it is a program, given whatever a conversation holds.
_REFUSALS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)

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
    variables = read_source(template).variables
    return next((name for name in THINKING_SWITCHES if name in variables), None)


class Template:
    """The chat template that a tokenizer or processor uses for given tools and template arguments.

    Attributes:
        text: The Jinja source of the template.
        tools: The tools, or None.

    Raises:
        ChatFormatError: if there is no chat template, or a template argument is reserved.
    """

    def __init__(
        self,
        processing_class: ProcessingClass,
        tools: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
    ) -> None:
        self._processing_class = processing_class
        self._start = start_of_prompts(processing_class)
        self.tools = None if tools is None else list(tools)
        self._kwargs = dict(kwargs or {})
        self._views: Views | None = None
        reserved = sorted(RESERVED & self._kwargs.keys())
        if reserved:
            raise ChatFormatError(
                f"chat_template_kwargs must not set {', '.join(reserved)}: rendering decides it; "
                "remove it"
            )
        try:
            self.text = find_chat_template(
                processing_class, self._kwargs.pop("chat_template", None), self.tools
            )
        except ValueError as error:
            raise ChatFormatError(
                f"the tokenizer has no chat template to render with ({error}); set "
                "tokenizer.chat_template"
            ) from error
        unread = tuple(name for name in self._kwargs if not self.names(name))
        if unread:
            _report_unread(self.text, unread)
        for name in unread:  # a processor would take it for an argument of its own
            del self._kwargs[name]

    @property
    def source(self) -> TemplateSource:
        """What the template's source reads."""
        return read_source(self.text)

    def names(self, name: str) -> bool:
        """Return whether the template's source reads this variable."""
        return name in self.source.variables

    def reads(self, key: str) -> bool:
        """Return whether the template's source gets this key of something, such as a message."""
        return key in self.source.keys

    @property
    def reads_reasoning(self) -> bool:
        """Whether the template reads one of the fields in which messages have reasoning."""
        return any(map(self.reads, REASONING_KEYS))

    @cached_property
    def cuts_reasoning(self) -> bool:
        """Whether the template leaves out what earlier messages have in ``<think>..</think>``."""
        if THINK_CLOSE not in self.source.texts:
            return False
        reasoning = "stand-in for reasoning"
        inline = f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{_CONTENT}"
        answer = {"role": "assistant", "content": inline}
        try:
            text = self.render([_EMPTY_QUESTION, answer, _EMPTY_QUESTION], prompt=True)
        except TemplateRefusal:
            return False
        return _CONTENT in text and reasoning not in text

    @cached_property
    def question(self) -> str:
        """What the template writes for an empty question."""
        return self.render([_EMPTY_QUESTION], prompt=False)

    @cached_property
    def question_prompt(self) -> str:
        """What inference feeds for an empty question."""
        return self.render([_EMPTY_QUESTION], prompt=True)

    @cached_property
    def thinking_switch(self) -> str | None:
        """The template argument that turns thinking on and off, None if it has none."""
        return _switch(self.text)

    @cached_property
    def takes_only_parts(self) -> bool:
        """Whether contents must be lists of parts, as for some vision models."""

        def writes(content: Any) -> bool:
            try:
                text = self.render([{"role": "user", "content": content}], prompt=False)
            except TemplateRefusal:
                return False
            return _CONTENT in text

        return (
            "type" in self.source.texts
            and not writes(_CONTENT)
            and writes([{"type": "text", "text": _CONTENT}])
        )

    @cached_property
    def takes_text_arguments(self) -> bool:
        """Whether arguments of tool calls must be JSON text: DeepSeek fails for dicts."""

        def refuses(arguments: Any) -> bool:
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                self.render_after_question(message)
            except TemplateRefusal:
                return True
            return False

        return refuses({"a": "b"}) and not refuses('{"a": "b"}')

    @cached_property
    def part_separator(self) -> str:
        """What comes between two text parts of a content, for inference.

        A template that takes parts writes it. To others servers give one text, joined by line ends.
        """
        first, second = "stand-in for part 1", "stand-in for part 2"
        parts = [{"type": "text", "text": text} for text in (first, second)]
        try:
            text = self.render([{"role": "user", "content": parts}], prompt=False)
        except TemplateRefusal:
            return "\n"
        between, found, _ = text.partition(first)[2].partition(second)
        return between if found and not between.strip() else "\n"

    def render_after_question(self, message: dict[str, Any]) -> str:
        """Return the text of an empty question and an assistant's message."""
        return self.render([_EMPTY_QUESTION, message], prompt=False)

    def render(self, messages: Sequence[dict[str, Any]], *, prompt: bool) -> str:
        """Return the text of the messages, with the generation prompt after it if ``prompt``.

        Raises:
            TemplateRefusal: if the template raises an error for these messages.
        """
        return (self._views.render if self._views else self._render)(messages, prompt)

    def sharing_views(self, read: Callable[[], Read]) -> Read:
        """Return what `read` makes of views of one long conversation, asked for from short to long.

        They are rendered from each other, see `onepass_trl.chat.views`; if this template writes
        them too differently, `read` is called again and each is rendered in full.
        """
        self._views = Views(self._render)
        try:
            result = read()
            self._views.check()
        except ViewsDiffer:
            logger.info(
                "this chat template writes the views of a conversation too differently to share "
                "them; each is rendered in full"
            )
        else:
            return result
        finally:
            self._views = None
        return read()

    def _render(self, messages: Sequence[dict[str, Any]], prompt: bool) -> str:
        """Return what :meth:`render` does, by the template alone."""
        try:
            text = self._processing_class.apply_chat_template(
                list(messages),
                chat_template=self.text,
                tools=self.tools,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._kwargs,
            )
        except _REFUSALS as error:
            what = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise TemplateRefusal(f"{what}{error}") from error
        assert isinstance(text, str)
        if not is_encodable(text):
            raise TemplateRefusal(
                "what it writes has an unpaired surrogate, which no tokenizer encodes; remove it "
                "from the messages, the tools or chat_template_kwargs"
            )
        return text if text.startswith(self._start) else self._start + text
