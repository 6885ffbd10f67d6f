"""JSON whose objects have no key twice: of two values, Python's reader keeps the last."""

from __future__ import annotations

from typing import Any


class RepeatedKeyError(ValueError):
    """An object of JSON has a key twice."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, for ``json.loads(.., object_pairs_hook=unique)``.

    Raises:
        RepeatedKeyError: if a key comes twice.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in made if keys.count(key) > 1)
        raise RepeatedKeyError(f"an object with the key {repeated!r} twice; keep one")
    return made
