"""The cost of every (forking token, trace) pair from few forwards, and who is matched with whom."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from onepass_trl.data import Layout, concatenate, linearize_with_targets
from onepass_trl.setsft.traces import TraceSet

METHODS = ("hungarian", "random", "fixed")
REDUCTIONS = ("mean", "sum")

Pair = tuple[int, int, int]
"""Number of the set, of the forking token and of the trace."""


@dataclass(frozen=True, eq=False)
class CostForward:
    """One forward that scores pairs.

    Attributes:
        row: the trees {question -> forking token -> trace} of the pairs, one after another.
        pairs: which pairs are in it.
        targets: ``(num_targets,)`` for each pair, where in the row its targets are predicted.
    """

    row: Layout
    pairs: list[Pair]
    targets: list[NDArray[np.int64]]


def plan_costs(
    sets: Sequence[TraceSet],
    token_ids: Sequence[int],
    *,
    num_targets: int | None = None,
    max_pairs: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[CostForward]:
    """Yield the forwards that score every forking token with every trace of each set.

    Within a forward the pairs of a set share their question, and the pairs of a forking token what
    their traces have in common.

    Args:
        token_ids: the K forking tokens.
        num_targets: how many trained tokens of a trace count, from its beginning; None: all.
        max_pairs: the most pairs in one forward; None: any number.
        max_tokens: the most row tokens in one forward, except that each has a pair; None: any
            number.
    """
    for chunk in _chunks(
        sets, len(token_ids), num_targets, max_pairs or math.inf, max_tokens or math.inf
    ):
        rows: list[Layout] = []
        targets: list[NDArray[np.int64]] = []
        start = 0
        for number in sorted({number for number, _, _ in chunk}):
            row, positions = linearize_with_targets(
                [
                    sets[number].traces[trace].after(token_ids[token], num_targets)
                    for number_, token, trace in chunk
                    if number_ == number
                ]
            )
            targets += [start + at for at in positions]
            rows.append(row)
            start += len(row)
        yield CostForward(concatenate(rows), chunk, targets)


def _chunks(
    sets: Sequence[TraceSet],
    num_tokens: int,
    num_targets: int | None,
    max_pairs: float,
    max_tokens: float,
) -> Iterator[list[Pair]]:
    """Yield the pairs of each forward; arguments as for :func:`plan_costs`.

    Lengths are upper bounds: tokens that traces of a forking token share are counted for each.
    """
    chunk: list[Pair] = []
    row_length = 0
    for number, set_ in enumerate(sets):
        lengths = [len(trace.after(0, num_targets)) - trace.fork for trace in set_.traces]
        for token in range(num_tokens):
            for trace, length in enumerate(lengths):
                question = set_.traces[trace].fork
                shared = question if chunk and chunk[-1][0] == number else 0
                added = question - shared + length
                if chunk and (len(chunk) >= max_pairs or row_length + added > max_tokens):
                    yield chunk
                    chunk, row_length, added = [], 0, question + length
                chunk.append((number, token, trace))
                row_length += added
    yield chunk


def add_costs(
    costs: list[NDArray[np.float64]],
    forward: CostForward,
    log_probs: NDArray[np.float32],
    reduction: str,
) -> None:
    """Enter what a forward scored into the sets' cost matrices.

    Args:
        costs: ``(K, num_traces)`` for each set: the loss of a trace after a forking token.
        log_probs: ``(num_tokens,)``, of the target at each position of its row.
        reduction: ``"mean"`` or ``"sum"`` over the targets of a trace.
    """
    for (number, token, trace), at in zip(forward.pairs, forward.targets, strict=True):
        losses = -log_probs[at].astype(np.float64)
        costs[number][token, trace] = losses.mean() if reduction == "mean" else losses.sum()


def match(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the forking token of each trace, ``(num_traces,)``, of the least total cost.

    No two traces get the same token.

    Args:
        costs: ``(K, num_traces)``, with at most K traces.

    >>> match(np.array([[1.0, 1.1], [2.0, 9.0], [1.1, 5.0]]))
    array([2, 0])
    """
    tokens, traces = linear_sum_assignment(costs)
    return tokens[np.argsort(traces)]


def match_at_random(num_tokens: int, num_traces: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Return different forking tokens for the traces, ``(num_traces,)``, drawn uniformly."""
    return np.random.default_rng(list(seed)).permutation(num_tokens)[:num_traces]


def match_in_order(set_: TraceSet, num_tokens: int) -> NDArray[np.int64]:
    """Return the forking token that the order of the completions gives each trace."""
    return np.array([trace.number % num_tokens for trace in set_.traces])


def random_cost(costs: NDArray[np.float64]) -> float:
    """Return the expected total cost of matching at random: each pair is equally likely.

    >>> random_cost(np.array([[1.0, 3.0], [2.0, 0.0]]))
    3.0
    """
    return float(costs.mean(axis=0).sum())


def assignment_entropy(counts: NDArray[np.float64]) -> float:
    """Return the entropy, in nats, of the shares in which the tokens were matched, ``(K,)``.

    It is ``log(K)`` if all are matched equally often, and 0 if always the same one is.

    >>> round(assignment_entropy(np.array([5.0, 5.0, 0.0])), 4)
    0.6931
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum()) + 0.0
