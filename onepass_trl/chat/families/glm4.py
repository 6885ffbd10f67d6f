"""GLM-4 MoE: no token ends a message; the model stops at the token that begins the next one.

The prompt ends in ``<|assistant|>``. A completion is
``\\n<think>reasoning</think>\\ncontent<|user|>``, or with tool calls
``..\\n<tool_call>name\\n..</tool_call><|observation|>``.
"""

from __future__ import annotations

from onepass_trl.chat.families.base import Turn
from onepass_trl.chat.families.composable import Composable
from onepass_trl.chat.template import Template

_USER, _OBSERVATION = "<|user|>", "<|observation|>"


class Glm4(Composable):
    """The completion goes on to the token that opens the next message."""

    name = "glm-4"

    def matches(self, template: Template) -> bool:
        """Return whether the template begins as GLM's and has its roles for user and tools."""
        return all(text in template.text for text in ("[gMASK]<sop>", _USER, _OBSERVATION))

    def completion(self, turn: Turn) -> str:
        """Return the turn and the token of the user, or of the tool that it calls."""
        end = _OBSERVATION if "tool_calls" in turn.message else _USER
        return super().completion(turn) + end
