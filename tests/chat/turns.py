"""Rendered turns, or the error of the first that can't be trained."""

from __future__ import annotations

from typing import Any

from onepass_trl.chat import RenderedTurn, render_each_turn
from onepass_trl.chat.turns import valid


def render_turns(messages: Any, tokenizer: Any, **options: Any) -> list[RenderedTurn]:
    return [valid(turn) for turn in render_each_turn(messages, tokenizer, **options)]
