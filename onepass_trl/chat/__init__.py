"""Conversations to passes: what inference sees and must generate in each trained turn."""

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.rendering import render_passes
from onepass_trl.chat.rows import Conversation, row_to_conversation, row_to_passes

__all__ = [
    "ChatFormatError",
    "Conversation",
    "render_passes",
    "row_to_conversation",
    "row_to_passes",
]
