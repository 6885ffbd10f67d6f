"""How messages say numbers."""

from __future__ import annotations


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return how many there are of something, in words.

    Args:
        number: how many.
        one: what it is of one, and a verb where there is one.
        several: the same of several, or of none; by default with an "s".

    >>> counted(1, "image"), counted(1200, "image"), counted(0, "turn is", "turns are")
    ('1 image', '1,200 images', '0 turns are')
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
