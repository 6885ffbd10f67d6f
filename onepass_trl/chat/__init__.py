"""Conversations to passes: what inference sees and must generate in each trained turn."""

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.families import register_family
from onepass_trl.chat.rendering import RenderedTurn, render_passes, render_turns
from onepass_trl.chat.rows import Conversation, row_to_conversation, row_to_passes, row_to_turns

__all__ = [
    "ChatFormatError",
    "Conversation",
    "RenderedTurn",
    "register_family",
    "render_passes",
    "render_turns",
    "row_to_conversation",
    "row_to_passes",
    "row_to_turns",
]
