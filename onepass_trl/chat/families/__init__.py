"""Template families, one module each, chosen by the text of the template."""

from __future__ import annotations

from onepass_trl.chat.families.base import Family, Turn
from onepass_trl.chat.families.composable import Composable
from onepass_trl.chat.families.deepseek import DeepSeek
from onepass_trl.chat.families.fenced import Fenced
from onepass_trl.chat.families.gemma4 import Gemma4
from onepass_trl.chat.families.glm4 import Glm4
from onepass_trl.chat.families.gpt_oss import GptOss
from onepass_trl.chat.families.kimi import Kimi
from onepass_trl.chat.families.qwq import Qwq
from onepass_trl.chat.families.registry import (
    FAMILIES,
    family_of,
    register_family,
    registered_families,
)

__all__ = [
    "FAMILIES",
    "Composable",
    "DeepSeek",
    "Family",
    "Fenced",
    "Gemma4",
    "Glm4",
    "GptOss",
    "Kimi",
    "Qwq",
    "Turn",
    "family_of",
    "register_family",
    "registered_families",
]
