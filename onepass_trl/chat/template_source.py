"""What the code of a chat template reads; its comments and its prose aren't code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import Environment
from jinja2.exceptions import TemplateSyntaxError

from onepass_trl.chat.errors import ChatFormatError

_ENVIRONMENT = Environment()
_ATTRIBUTE = re.compile(r"(\w*)\s*\.\s*(\w+)")
_ITEM = re.compile(
    r"""[\w)\]]\s*\[\s*['"](\w+)['"]\s*\]|\bget\(\s*['"](\w+)['"]|['"](\w+)['"]\s+(?:not\s+)?in\b"""
)
_NAMESPACE = re.compile(r"(\w+)\s*=\s*namespace\b")
_VARIABLE = re.compile(r"""(?<![.\w'"])[^\W\d]\w*\b(?!\s*=[^=])""")


@dataclass(frozen=True)
class TemplateSource:
    """What a template's source reads, and its texts.

    Attributes:
        variables: The variables that it reads, such as ``enable_thinking``.
        keys: The keys that it gets of something, such as a message: ``message.role``,
            ``message['role']``, ``message.get('role')``, ``'role' in message``. Those of its own
            namespaces are none.
        texts: The source without its comments: what it writes, and what it compares with.
    """

    variables: frozenset[str]
    keys: frozenset[str]
    texts: str


@lru_cache(maxsize=64)
def read_source(template: str) -> TemplateSource:
    """Return what is in a template's source.

    Raises:
        ChatFormatError: if it isn't Jinja.

    >>> source = read_source("{# Thinking #}{{ m['role'] }} is thinking: {{ m.text or default }}")
    >>> sorted(source.variables - {"or"}), sorted(source.keys)
    (['default', 'm'], ['role', 'text'])
    """
    try:
        tokens = [(kind, value) for _, kind, value in _ENVIRONMENT.lex(template)]
    except TemplateSyntaxError as error:
        raise ChatFormatError(
            f"the chat template isn't valid Jinja: {error.message} (line {error.lineno}); "
            "correct it"
        ) from error
    code = "".join(_as_code(kind, value) for kind, value in tokens)
    namespaces = set(_NAMESPACE.findall(code))
    attributes = {name for owner, name in _ATTRIBUTE.findall(code) if owner not in namespaces}
    items = {name for names in _ITEM.findall(code) for name in names if name}
    return TemplateSource(
        frozenset(_VARIABLE.findall(code)),
        frozenset(attributes | items),
        "".join(value for kind, value in tokens if not kind.startswith("comment")),
    )


def _as_code(kind: str, value: str) -> str:
    """Return a token of the source as code without prose: a text that can't be a key is empty."""
    if kind == "string" and not value[1:-1].isidentifier():
        return "''"
    return value if kind in ("name", "operator", "string", "whitespace") else ";"
