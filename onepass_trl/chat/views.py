"""What a template writes for the beginnings of one long conversation, in near-linear time.

A template goes through all messages to write a view: the first messages of a conversation, as
inference sees them before a turn. From one view to the next only the end changes, as a rule. So the
template writes the next view without its middle, and this end is put after the known text:

    known view      head, middle, guard, end    rendered in full, or put together like the next
    the same, cut   head,         guard, end    must end in the same guard and end
    next view, cut  head,         guard, new    must begin with the same head and guard
    next view       head, middle, guard, new

No template is taken to be like that on trust. Of each kind of view, by the roles and keys of its
last messages, the first is compared with its full rendering, then one whenever the length has
doubled, and the last. Later views hold the text from which earlier ones went on, so whatever is
wrong in that is seen, too; where it is given up, it is compared before. If a view differs, all are
rendered in full.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onepass_trl.chat.encoding import shared_prefix
from onepass_trl.chat.errors import TemplateRefusal
from onepass_trl.chat.messages import Message

Render: TypeAlias = Callable[[Sequence[Message], bool], str]
"""Returns the text of messages, with the generation prompt after it or without."""
_Kind: TypeAlias = tuple[bool, tuple[str, str], frozenset[str]]

# In messages. Views up to this length are always rendered in full: cutting them gains nothing.
MIN_LENGTH = 48
_HEAD = 4  # left before the middle, at least
_GUARD = 4  # after the middle, at least
_KEPT = 12  # guard and end
_SEAMS = 8  # how many places for the end of the middle are tried
_STEP = 10  # by how much a view grows before a longer middle is left out


class ViewsDiffer(Exception):
    """A view that was put together isn't what the template writes."""


@dataclass(frozen=True)
class _View:
    """The text of messages, and whether it was rendered in full."""

    messages: Sequence[Message]
    prompt: bool
    text: str
    in_full: bool

    @property
    def kind(self) -> _Kind:
        """What it has in common with views whose ends a template writes alike."""
        return (
            self.prompt,
            _roles(self.messages, len(self.messages) - 1),
            frozenset(self.messages[-1]),
        )


@dataclass(frozen=True)
class _Cut:
    """The middle that later views are rendered without.

    Attributes:
        messages: The messages of the known view.
        middle: The indices of those left out.
        text: Head, middle and guard in the known view.
        short: Head and guard in the same view without the middle.
    """

    messages: Sequence[Message]
    middle: range
    text: str
    short: str


class Views:
    """The texts of the views of one conversation, asked for in the order of their lengths.

    Args:
        render: Renders in full.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        # The last one with a prompt, if there are such: longer ones begin with it.
        self._known: _View | None = None
        self._cut: _Cut | None = None
        self._next_cut = 0  # the length from which another cut is tried
        self._next_check: dict[_Kind, int] = {}  # the length from which a view is checked
        self._unchecked: dict[_Kind, _View] = {}  # the last one, if it wasn't

    def render(self, messages: Sequence[Message], prompt: bool) -> str:
        """Return the text of the messages, with the generation prompt after it if `prompt`.

        Raises:
            TemplateRefusal: if the template raises an error for these messages.
            ViewsDiffer: if a view that was put together isn't what the template writes.
        """
        if len(messages) <= MIN_LENGTH:
            return self._render(messages, prompt)
        text = self._put_together(messages, prompt)
        if text is None:
            view = _View(messages, prompt, self._render(messages, prompt), in_full=True)
        else:
            view = _View(messages, prompt, text, in_full=False)
            self._unchecked[view.kind] = view
            if len(messages) >= self._next_check.get(view.kind, 0):
                self._next_check[view.kind] = 2 * len(messages)
                self._check(view)
        if prompt or not (self._known and self._known.prompt):
            self._known = view
        return view.text

    def check(self) -> None:
        """Compare the last view of each kind with its full rendering.

        Raises:
            ViewsDiffer: if one is something else.
        """
        for view in list(self._unchecked.values()):
            self._check(view)

    def _check(self, view: _View) -> None:
        try:
            text = self._render(view.messages, view.prompt)
        except TemplateRefusal as refusal:
            raise ViewsDiffer from refusal
        if view.text != text:
            raise ViewsDiffer
        self._unchecked.pop(view.kind, None)

    def _put_together(self, messages: Sequence[Message], prompt: bool) -> str | None:
        """Return the text of a view by a cut one, None if it has to be rendered in full."""
        try:
            text = self._gone_on(self._cut, messages, prompt)
            if len(messages) >= self._next_cut or (self._cut and text is None):
                text = self._cut_again(messages, prompt) or text
        except TemplateRefusal:  # the template says it in full
            return None
        if text is None and self._cut:
            self._cut = None
            if self._known and not self._known.in_full:
                self._check(self._known)
        return text

    def _gone_on(self, cut: _Cut | None, messages: Sequence[Message], prompt: bool) -> str | None:
        if cut is None or not _begins(messages, cut.messages):
            return None
        text = self._render(_without(messages, cut.middle), prompt)
        return cut.text + text[len(cut.short) :] if text.startswith(cut.short) else None

    def _cut_again(self, messages: Sequence[Message], prompt: bool) -> str | None:
        """Return the text of a view by the longest middle for which there is one."""
        known = self._known
        if known is None or not _begins(messages, known.messages):
            return None
        self._next_cut = len(messages) + _STEP
        kept = _KEPT
        while kept < len(known.messages) - _HEAD:
            cut = self._cut_of(known, kept)
            text = self._gone_on(cut, messages, prompt)
            if text is not None:
                self._cut = cut
                return text
            kept *= 2
        return None

    def _cut_of(self, known: _View, kept: int) -> _Cut | None:
        """Return a cut that keeps about `kept` messages of a view, None if its end changes."""
        messages = known.messages
        found = _middles(messages, kept)
        if found is None:
            return None
        middle, longer = found
        try:
            short = self._render(_without(messages, middle), known.prompt)
            shorter = self._render(_without(messages, longer), known.prompt)
        except TemplateRefusal:
            return None
        # The guard is what the two differ in. Where it begins is vague if messages begin alike.
        latest = shared_prefix(short, shorter)
        earliest = len(shorter) - shared_prefix(short[::-1], shorter[::-1])
        begin = (earliest + latest) // 2
        if earliest > latest or not known.text.endswith(short[begin:]):
            return None
        end = len(shorter) - begin
        return _Cut(
            messages, middle, known.text[: len(known.text) - end], short[: len(short) - end]
        )


def _middles(messages: Sequence[Message], kept: int) -> tuple[range, range] | None:
    """Return the indices of a middle, and of one with the guard, None if there are none.

    Where a middle is left out, messages of two roles meet that follow each other before it too:
    templates may want users and assistants to alternate, or calls before results.
    """
    found = []
    last = len(messages) - kept
    for end in range(last, max(last - _SEAMS, _HEAD), -1):
        begin = _seam(messages, range(_HEAD, end), end)
        end_with_guard = _seam(messages, range(end + _GUARD, len(messages)), end)
        if begin is not None and end_with_guard is not None:
            found.append((range(begin, end), range(begin, end_with_guard)))
    return min(found, key=lambda middles: middles[0].start, default=None)


def _seam(messages: Sequence[Message], places: range, like: int) -> int | None:
    """Return the first place between messages of the same roles as at another place."""
    roles = _roles(messages, like)
    return next((place for place in places if _roles(messages, place) == roles), None)


def _roles(messages: Sequence[Message], place: int) -> tuple[str, str]:
    return messages[place - 1]["role"], messages[place]["role"]


def _without(messages: Sequence[Message], middle: range) -> list[Message]:
    return [*messages[: middle.start], *messages[middle.stop :]]


def _begins(messages: Sequence[Message], first: Sequence[Message]) -> bool:
    """Return whether messages begin with these very objects."""
    return len(first) <= len(messages) and all(map(operator.is_, messages, first))
