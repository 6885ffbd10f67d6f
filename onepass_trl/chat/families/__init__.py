"""Template families, one module each, chosen by the text of the template."""

from __future__ import annotations

from onepass_trl.chat.families.base import Family, Turn
from onepass_trl.chat.families.composable import Composable
from onepass_trl.chat.families.deepseek_r1 import DeepSeekR1
from onepass_trl.chat.families.gpt_oss import GptOss

__all__ = ["FAMILIES", "Family", "Turn", "family_of"]

# The first that matches is taken; the last matches everything.
FAMILIES: tuple[Family, ...] = (GptOss(), DeepSeekR1(), Composable())


def family_of(template: str) -> Family:
    """Return the family of a template, given as its Jinja source.

    >>> family_of("{% for message in messages %}{{ message.content }}{% endfor %}").name
    'composable'
    """
    return next(family for family in FAMILIES if family.matches(template))
