"""Templates that compose: the conversation with the turn begins with the turn's context.

Qwen3, Nemotron, LFM2.5, Llama 3, Phi and most others. Whatever isn't another family is taken for
one of these, and the checks on each turn show whether it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from onepass_trl.chat.encoding import shared_prefix
from onepass_trl.chat.errors import TurnError
from onepass_trl.chat.families.base import SPLIT_CALLS, Family, Turn
from onepass_trl.chat.marks import THINK_CLOSE, THINK_OPEN
from onepass_trl.chat.template import Template

_STAND_IN = "[reasoning]"


class Composable(Family):
    """The completion is what the template writes for the turn after the context."""

    name = "composable"
    remedies: ClassVar[Mapping[str, str]] = {
        "single tool-calls": SPLIT_CALLS,
        "roles must alternate": (
            "it takes questions and answers by turns: join messages of one role, and put a system "
            "message into the first question; for tool messages use another template"
        ),
        "System role not supported": "put its text into the first question",
        "Unexpected message role": "give instructions the role 'system'",
    }

    def matches(self, template: Template) -> bool:
        """Return True: this is the family of templates that need no special treatment."""
        return True

    def reads_reasoning(self, template: Template) -> bool:
        """Return whether the template reads one of the message's reasoning fields.

        If not (Llama, Qwen2.5), ``<think>..</think>`` in a content is content: it stays in later
        contexts too.
        """
        return template.reads_reasoning

    def completion(self, turn: Turn) -> str:
        """Return the end of the conversation's rendering, after the context."""
        reads_reasoning = self.reads_reasoning(turn.template)
        if turn.reasoning and not reads_reasoning:
            inline = turn.with_reasoning("").with_content(turn.reasoning)
            written = turn.template.render(inline.messages, prompt=False)
            remedy = (
                f"put it into the content as {THINK_OPEN}..{THINK_CLOSE} if later turns are to see "
                "it"
                if turn.reasoning.strip() in written
                else "remove it"
            )
            raise TurnError(
                "it has reasoning, but the template has no place for any and would drop it; use a "
                f"template of a reasoning model, or {remedy}"
            )
        full = turn.template.render(turn.messages, prompt=False)
        if full.startswith(turn.context):
            return full[len(turn.context) :]
        if reads_reasoning and not turn.reasoning.strip():
            # Nemotron's prompt opens the reasoning and its template writes `<think></think>` for
            # none. The model then has to close what the prompt opened, as it does after reasoning.
            opened = turn.context + _STAND_IN
            filled = turn.template.render(turn.with_reasoning(_STAND_IN).messages, prompt=False)
            if filled.startswith(opened):
                return filled[len(opened) :]
        opened = turn.context.rstrip()
        if turn.ends_prompt(THINK_OPEN) and full.startswith(opened):
            # The prompt ends in other white space than turns have there, as axolotl's for Qwen3.
            return full[len(opened) :].lstrip()
        if turn.ends_prompt(THINK_OPEN) and not reads_reasoning:
            raise TurnError(
                f"the prompt before it, which ends in {turn.context[-20:]!r}, opens its reasoning. "
                "This template takes the reasoning from the content: begin that with the "
                f"reasoning, as in {THINK_OPEN}..{THINK_CLOSE}.."
            )
        if turn.ends_prompt(THINK_CLOSE):
            turn.refuse_reasoning()
        at = shared_prefix(full, turn.context)
        raise TurnError(
            "this is a template of an unknown family: with the turn, it doesn't go on from the "
            f"turn's context. Where the context has {turn.context[at : at + 40]!r}, the "
            f"conversation has {full[at : at + 40]!r}. Use the template of a supported family, "
            "check chat_template_kwargs, or add the family with onepass_trl.register_family"
        )
