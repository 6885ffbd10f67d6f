"""Gated and Kimi delta rules along the passes of a tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onepass_trl.attention.branching.chunked_delta_rule import along_chunks
from onepass_trl.attention.branching.fla_rule import along_tree_by_fla, usable_backend
from onepass_trl.attention.branching.packages import (
    is_of_transformers,
    refusal_on_cpu,
    runs_in_interpreter,
)
from onepass_trl.attention.branching.recurrences import along_tree
from onepass_trl.attention.head_exchange import ContextParallel


def delta_rule(rule: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `rule`, a gated or Kimi delta rule, made to follow `visible_end`.

    On GPUs fla computes it where it can take a tree, whatever `rule` is.
    """
    backend = usable_backend()
    refuse_cpu = refusal_on_cpu(rule, name)
    interpreted = runs_in_interpreter()

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
        refuse_cpu(key)
        if visible_end is None:
            return run(sequences, initial_state, output_final_state)
        assert initial_state is None
        assert not output_final_state
        if backend is not None and (key.device.type != "cpu" or interpreted):
            along = functools.partial(along_tree_by_fla, backend, name, **kwargs)
        elif is_of_transformers(rule):
            along = functools.partial(along_chunks, **kwargs)
        else:
            along = functools.partial(along_tree, run)
        return _of_whole_rows(along, visible_end, sequences, name, context_parallel), None

    return branching


# What is made of a tree, and its number of steps, differ from batch to batch, so code would be
# compiled for each. The hooks of autograd are no part of a graph either.
@torch.compiler.disable
def _of_whole_rows(
    along: Callable[[Tensor, Sequence[Tensor]], Tensor],
    visible_end: Tensor,
    sequences: Sequence[Tensor],
    name: str,
    context_parallel: ContextParallel | None,
) -> Tensor:
    """Return ``along(visible_end, sequences)``, of rows that processes have pieces of too."""
    if context_parallel is None:
        return along(visible_end, sequences)
    whole = context_parallel.to_whole_rows(name, *sequences)
    return context_parallel.to_own_piece(along(visible_end, whole))
