"""Gated and Kimi delta rules along the passes of a tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from onepass_trl.attention.branching.chunked_delta_rule import along_chunks
from onepass_trl.attention.branching.packages import is_of_transformers
from onepass_trl.attention.branching.recurrences import along_tree
from onepass_trl.attention.head_exchange import ContextParallel


def delta_rule(rule: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `rule`, a gated or Kimi delta rule, made to follow `visible_end`."""

    @functools.wraps(rule)
    def branching(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        visible_end: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        def run(
            pieces: Sequence[Tensor], initial: Tensor | None, wants_state: bool
        ) -> tuple[Tensor, Tensor | None]:
            q, k, v, decay, rate = pieces
            state = dict(initial_state=initial, output_final_state=wants_state)
            return rule(q, k, v, g=decay, beta=rate, **state, **kwargs)

        sequences = (query, key, value, g, beta)
        if visible_end is None:
            return run(sequences, initial_state, output_final_state)
        assert initial_state is None
        assert not output_final_state
        if is_of_transformers(rule):
            out = along_chunks(visible_end, sequences, name, context_parallel, **kwargs)
        else:
            out = along_tree(visible_end, run, sequences, name, context_parallel)
        return out, None

    return branching
