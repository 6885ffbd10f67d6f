"""Conversations to passes: what inference sees and must generate in each trained turn."""

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.families import register_family
from onepass_trl.chat.records import Conversation, read_conversation
from onepass_trl.chat.rendering import RenderedTurn, render_answers, render_each_turn, render_passes
from onepass_trl.chat.turns import InvalidTurn

__all__ = [
    "ChatFormatError",
    "Conversation",
    "InvalidTurn",
    "RenderedTurn",
    "read_conversation",
    "register_family",
    "render_answers",
    "render_each_turn",
    "render_passes",
]
