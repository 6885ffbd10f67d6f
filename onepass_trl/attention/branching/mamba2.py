"""The scan of Mamba 2 along the passes of a tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from onepass_trl.attention.branching.recurrences import along_tree
from onepass_trl.attention.head_exchange import ContextParallel


def chunk_scan(scan: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `scan`, that of Mamba 2, made to follow `visible_end`."""

    @functools.wraps(scan)
    def branching(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        *,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        visible_end: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        def run(
            pieces: Sequence[Tensor], initial: Tensor | None, wants_state: bool
        ) -> tuple[Tensor, Tensor | None]:
            x, step, b, c = pieces
            options = dict(D=D, dt_bias=dt_bias, **kwargs)
            state = dict(initial_states=initial, return_final_states=wants_state)
            result = scan(x, step, A, b, c, chunk_size, **state, **options)
            return result if wants_state else (result, None)

        sequences = (hidden_states, dt, B, C)
        if visible_end is None:
            out, final = run(sequences, initial_states, return_final_states)
            return (out, final) if return_final_states else out
        assert initial_states is None
        assert not return_final_states
        if context_parallel is not None:
            A = context_parallel.own_share(A)
            D = None if D is None else context_parallel.own_share(D)
            dt_bias = None if dt_bias is None else context_parallel.own_share(dt_bias)
        return along_tree(visible_end, run, sequences, name, context_parallel)

    return branching


def fused_scan(convolve_and_scan: Callable[..., Any], _: str) -> Callable[..., Any]:
    """Return Mamba 2's convolution and scan in one, made to leave both to others on a tree."""

    @functools.wraps(convolve_and_scan)
    def branching(*args: Any, visible_end: Tensor | None = None, **kwargs: Any) -> Any:
        # None: the layer then calls the convolution and the scan apart.
        return convolve_and_scan(*args, **kwargs) if visible_end is None else None

    return branching
