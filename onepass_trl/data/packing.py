"""Rows of at most ``max_length`` tokens, from long passes, large trees and short rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from onepass_trl.data.tree import TokenTree, build_tree
from onepass_trl.passes import Pass

OVERFLOW_POLICIES = ("truncate", "error", "drop")


def check_max_length(max_length: int) -> None:
    """Raise ValueError for a `max_length` within which nothing can be trained."""
    if not max_length >= 2:
        raise ValueError(
            f"max_length must be at least 2 (a token of context and its target) or None, got "
            f"{max_length}"
        )


@dataclass
class Overflow:
    """What an overflow policy took away from the passes of a conversation, or of several.

    Attributes:
        num_passes: passes that were longer than ``max_length``.
        num_lost_turns: those of which no trained token is left.
        num_lost_tokens: trained tokens that are no longer trained.
        longest: tokens of the longest pass, before the policy.
    """

    num_passes: int = 0
    num_lost_turns: int = 0
    num_lost_tokens: int = 0
    longest: int = 0

    def add(self, other: Overflow) -> None:
        """Add what was taken away from other passes."""
        self.num_passes += other.num_passes
        self.num_lost_turns += other.num_lost_turns
        self.num_lost_tokens += other.num_lost_tokens
        self.longest = max(self.longest, other.longest)


def limit_passes(
    passes: Sequence[Pass], max_length: int, overflow: str
) -> tuple[list[Pass], Overflow]:
    """Return the passes, none longer than `max_length` tokens, and what that took away.

    Args:
        overflow: ``"truncate"`` keeps the first `max_length` tokens of a pass (as ``SFTTrainer``
            does) without cutting an image, ``"drop"`` leaves the pass out, ``"error"`` raises.

    Raises:
        ValueError: under ``"error"``, if a pass is longer; for any other policy; and unless
            `max_length` has room for a token of context and its target.

    >>> limit_passes([Pass([1, 2, 3, 4], [0, 0, 1, 1])], 3, "truncate")[1]
    Overflow(num_passes=1, num_lost_turns=0, num_lost_tokens=1, longest=4)
    """
    if overflow not in OVERFLOW_POLICIES:
        raise ValueError(
            f"overflow must be one of {', '.join(OVERFLOW_POLICIES)}, got {overflow!r}"
        )
    check_max_length(max_length)
    kept: list[Pass] = []
    lost = Overflow(longest=max((len(pass_) for pass_ in passes), default=0))
    for index, pass_ in enumerate(passes):
        if len(pass_) <= max_length:
            kept.append(pass_)
            continue
        if overflow == "error":
            raise ValueError(
                f"pass {index} (of {len(passes)}) has {len(pass_)} tokens, but max_length is "
                f"{max_length}; raise max_length to at least {lost.longest}, or choose "
                'overflow="truncate" or overflow="drop"'
            )
        lost.num_passes += 1
        remaining = pass_.num_trained
        shorter = pass_.first(max_length) if overflow == "truncate" else None
        if shorter is not None:
            kept.append(shorter)
            remaining -= shorter.num_trained
        else:
            lost.num_lost_turns += 1
        lost.num_lost_tokens += remaining
    return kept, lost


def split_passes(passes: Sequence[Pass], max_length: int) -> list[TokenTree]:
    """Return trees of at most `max_length` row tokens that hold each pass exactly once.

    The tree of all passes is cut along its branches: each tree takes neighbouring branches and
    repeats only their common path, which is untrained in all trees except the one that trains it.

    Raises:
        ValueError: if a pass is longer than `max_length`; see `limit_passes`.

    >>> passes = [Pass([1, 2, 3], [0, 0, 1]), Pass([1, 2, 4, 5], [0, 0, 1, 1])]
    >>> [tree.num_row_tokens() for tree in split_passes(passes, 6)]
    [6]
    >>> [tree.num_row_tokens() for tree in split_passes(passes, 5)]
    [4, 3]
    """
    if passes and (longest := max(map(len, passes))) > max_length:
        raise ValueError(f"a pass has {longest} tokens, more than max_length {max_length}")
    whole = TokenTree()
    ending_in: dict[int, list[Pass]] = {}
    for pass_ in passes:
        ending_in.setdefault(whole.insert(pass_), []).append(pass_)
    if whole.num_row_tokens() <= max_length:
        return [whole]
    ordered = [pass_ for index, _, _ in whole.depth_first() for pass_ in ending_in.get(index, [])]
    groups: list[list[Pass]] = []
    tree = TokenTree()
    for pass_ in ordered:
        tree.insert(pass_)
        if not groups or tree.num_row_tokens() > max_length:
            groups.append([])
            tree = build_tree([pass_])
        groups[-1].append(pass_)
    return [build_tree(group) for group in groups]


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Return groups of indices whose lengths sum to at most `max_length`: best fit decreasing.

    Raises:
        ValueError: if a length is larger than `max_length`.

    >>> pack([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]
    """
    if lengths and max(lengths) > max_length:
        raise ValueError(f"a row has {max(lengths)} tokens, more than max_length {max_length}")
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fit = bisect_left(free, (lengths[index], -1))
        if fit < len(free):
            left, group = free.pop(fit)
        else:
            left, group = max_length, len(groups)
            groups.append([])
        groups[group].append(index)
        insort(free, (left - lengths[index], group))
    return groups
