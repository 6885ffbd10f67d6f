"""Which family a template belongs to: those of user code first, then those of this package."""

from __future__ import annotations

from onepass_trl.chat.families.base import Family
from onepass_trl.chat.families.composable import Composable
from onepass_trl.chat.families.deepseek import DeepSeek
from onepass_trl.chat.families.gemma4 import Gemma4
from onepass_trl.chat.families.glm4 import Glm4
from onepass_trl.chat.families.gpt_oss import GptOss
from onepass_trl.chat.families.kimi import Kimi
from onepass_trl.chat.families.qwq import Qwq
from onepass_trl.chat.template import Template

# The first that matches is taken; the last matches everything.
FAMILIES: tuple[Family, ...] = (GptOss(), DeepSeek(), Gemma4(), Glm4(), Kimi(), Qwq(), Composable())

_registered: list[Family] = []


def register_family(family: Family) -> None:
    """Make `family` known: a template that it matches is rendered by it from now on.

    Families registered later are asked first, and all of them before those of this package. A
    family replaces one of the same name.

    Args:
        family: An instance of a subclass of `onepass_trl.chat.families.Family`, or of one of the
            families there. ``docs/chat_formats.md`` has an example.

    Raises:
        TypeError: if it isn't a family.
    """
    if not isinstance(family, Family):
        raise TypeError(
            f"register_family takes an instance of onepass_trl.chat.families.Family, got {family!r}"
        )
    _registered[:] = [family, *(other for other in _registered if other.name != family.name)]


def registered_families() -> tuple[Family, ...]:
    """Return the families of user code, in the order in which they are asked."""
    return tuple(_registered)


def family_of(template: Template) -> Family:
    """Return the family of a template."""
    return next(family for family in (*_registered, *FAMILIES) if family.matches(template))
