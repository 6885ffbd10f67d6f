"""A trace: a pass in which one place is left for a forking token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onepass_trl.passes import Pass


@dataclass(frozen=True, eq=False)
class Trace:
    """One solution of a question: the question, a forking token, the reasoning and the answer.

    Attributes:
        pass_: the tokens, and which of them are trained. Whatever stands at `fork` is replaced.
        fork: index of the forking token. It is given, not learned, so it isn't trained.
        number: the trace's number among the completions of its row.
    """

    pass_: Pass
    fork: int
    number: int

    def behind(self, token_id: int, num_targets: int | None = None) -> Pass:
        """Return the pass of this trace behind a forking token.

        Args:
            token_id: the forking token.
            num_targets: cut the pass behind its so many first trained tokens; None: leave it whole.

        >>> Trace(Pass([5, 0, 6, 7], [0, 0, 1, 1]), fork=1, number=0).behind(9, 1).token_ids
        array([5, 9, 6], dtype=int32)
        """
        ids, trained = self.pass_.token_ids.copy(), self.pass_.trained
        ids[self.fork] = token_id
        if num_targets is not None and num_targets < self.pass_.num_trained:
            end = int(np.flatnonzero(trained)[num_targets - 1]) + 1
            ids, trained = ids[:end], trained[:end]
        return Pass(ids, trained)


@dataclass(frozen=True, eq=False)
class TraceSet:
    """The traces of one question that are matched with one another.

    Attributes:
        traces: at least one, at most as many as there are forking tokens.
        index: the number of its row in the dataset, which seeds what is drawn for it.
    """

    traces: tuple[Trace, ...]
    index: int

    def num_row_tokens(self) -> int:
        """Return how many tokens the traces have as one row, each behind a token of its own.

        >>> traces = [Trace(Pass([5, 0, *ids], [0, 0, *ids]), 1, 0) for ids in ([6, 7], [6])]
        >>> TraceSet(tuple(traces), 0).num_row_tokens()
        6
        """
        question = max(trace.fork for trace in self.traces)
        return question + sum(len(trace.pass_) - trace.fork for trace in self.traces)

    def behind(self, token_ids: Sequence[int]) -> list[Pass]:
        """Return the pass of each trace behind its own forking token."""
        return [trace.behind(token) for trace, token in zip(self.traces, token_ids, strict=True)]
