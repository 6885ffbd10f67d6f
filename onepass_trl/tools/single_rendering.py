"""What training on a single rendering of a conversation makes of the turns that one pass trains.

A chat template hides reasoning from later turns, so no single rendering shows all turns as
inference does. Three are in use:

- all turns: the conversation as the template renders it, all assistant turns labelled. A turn whose
  reasoning is hidden from the end of the conversation is trained to answer without any.
- last turn: the same rendering, with the last assistant turn alone labelled.
- reasoning kept: all turns labelled, and all reasoning left in, by another template or a switch of
  it. Turns are trained on a context that holds reasoning that inference hides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from onepass_trl.chat.encoding import encode_alone
from onepass_trl.chat.errors import TemplateRefusal
from onepass_trl.chat.messages import REASONING_KEYS
from onepass_trl.chat.processing import ProcessingClass
from onepass_trl.chat.turns import TurnContext, TurnRenderer

if TYPE_CHECKING:
    from onepass_trl.preparation.rows import RenderedRecord

_MARK = re.compile(r"\[reasoning of message \d+\]")

ALL_TURNS, LAST_TURN, REASONING_KEPT = "all turns", "last turn", "reasoning kept"


@dataclass
class Training:
    """What a way of training makes of turns.

    Attributes:
        turns: those that one pass trains.
        faithful: turns that are trained in the context that inference gives, with their reasoning
            if they have any.
        untrained: turns that aren't trained.
        untrained_tokens: of these.
        unreasoned: turns that are trained without their reasoning.
        unreasoned_tokens: of this reasoning.
        displaced: turns that are trained in a context that inference never gives, some of them
            without their reasoning.
        displaced_tokens: of these; only what is trained.
    """

    turns: int = 0
    faithful: int = 0
    untrained: int = 0
    untrained_tokens: int = 0
    unreasoned: int = 0
    unreasoned_tokens: int = 0
    displaced: int = 0
    displaced_tokens: int = 0

    def add(self, other: Training) -> None:
        """Add what becomes of other turns."""
        for name in (column.name for column in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def train_on_one_rendering(
    record: RenderedRecord, processing_class: ProcessingClass
) -> dict[str, Training]:
    """Return what the three ways make of the turns of a conversation.

    It was rendered with `processing_class` from messages, and has at least one turn. If the
    template refuses the conversation as a whole, none of the ways trains anything.
    """
    turns = record.turns
    renderer = TurnRenderer(processing_class, turns[0].tools, record.chat_template_kwargs)
    tokenizer = renderer.tokenizer
    messages, _ = renderer.read(record.messages, "all")
    context = renderer.context(messages)
    # A text of its own in place of each reasoning shows where the template leaves that one out.
    marks = {
        index: f"[reasoning of message {index}]"
        for index, message in enumerate(messages)
        if "reasoning_content" in message
    }
    context.prepared = [
        message | dict.fromkeys(REASONING_KEYS, marks[index]) if index in marks else message
        for index, message in enumerate(context.prepared)
    ]
    befores, whole = context.template.sharing_views(
        lambda: _texts(context, [turn.index for turn in turns], tokenizer.eos_token)
    )
    ways = {way: Training() for way in (ALL_TURNS, LAST_TURN, REASONING_KEPT)}
    for turn, before in zip(turns, befores, strict=True):
        is_shown = turn.index not in marks or marks[turn.index] in whole
        shown = set(_MARK.findall(before))
        shown_before = all(mark in shown for index, mark in marks.items() if index < turn.index)
        tokens = turn.rendered.num_trained
        reasoning = encode_alone(tokenizer, [turn.message.get("reasoning_content", "")])[0].size
        untrained = Training(1, untrained=1, untrained_tokens=tokens)
        rendered = _labelled(tokens, 0 if is_shown else reasoning, whole.startswith(before))
        kept = _labelled(tokens, 0, shown_before)
        ways[ALL_TURNS].add(rendered if whole else untrained)
        ways[LAST_TURN].add(rendered if whole and turn is turns[-1] else untrained)
        ways[REASONING_KEPT].add(kept if whole else untrained)
    return ways


def _labelled(tokens: int, hidden: int, is_placed: bool) -> Training:
    """Return what becomes of a labelled turn.

    Args:
        tokens: that the turn should be trained on.
        hidden: those of its reasoning if the rendering leaves it out, else 0.
        is_placed: whether the rendering begins with its context.
    """
    made = Training(turns=1, faithful=int(is_placed and not hidden))
    if hidden:
        made.unreasoned, made.unreasoned_tokens = 1, hidden
    if not is_placed:
        made.displaced, made.displaced_tokens = 1, tokens - hidden
    return made


def _texts(context: TurnContext, indices: Sequence[int], eos: str | None) -> tuple[list[str], str]:
    """Return what comes before messages, and all of it, ``""`` if the template refuses that."""
    befores = [_text(context.up_to(index), eos) for index in indices]
    try:
        return befores, _text(context, eos)
    except TemplateRefusal:
        return befores, ""


def _text(context: TurnContext, eos: str | None) -> str:
    """Return the messages as the template writes them, without a prompt after them.

    Some templates write the end token after a whole conversation, which no later context has.
    """
    text = context.template.render(context.prepared, prompt=False)
    return text.removesuffix(eos or "")
