"""fla's delta rules along a tree: a backend in fla's own registry, and calls that it recognizes.

Only two functions of fla carry a state from chunk to chunk: `chunk_gated_delta_rule_fwd_h` and, in
the backward pass, `chunk_gated_delta_rule_bwd_dhu`. In a call that `along_levels` has made they run
level by level, each level one launch of fla's kernel for its segments, with states and gradients of
states in float32. Everything else of fla treats each chunk by itself and runs once over all.

The backend recognizes such a call by a tensor that fla hands through: the states in which segments
begin (zeros, which it fills), and in the backward pass the gradient of the output. So what else
runs in the thread, before or after an error or in a recomputation, is never taken for it.

fla saves the states in which segments begin. Its backward pass, which computes the states of all
chunks again, does that in one launch.

Import it through `fla_rule`, which checks that fla is there and is as expected.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fla.backends import BaseBackend, register
from fla.ops.common import chunk_delta_h
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.kda import chunk_kda
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from onepass_trl.attention.branching.levels import Level, Levels

# By the names of transformers. Without fla's choice of a backend for the whole rule, which would
# know of no levels.
RULES: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "torch_chunk_gated_delta_rule": inspect.unwrap(chunk_gated_delta_rule),
    "chunk_kimi_delta_attention": inspect.unwrap(chunk_kda),
}
_OPTIONS = {name: inspect.signature(rule).parameters.keys() for name, rule in RULES.items()}
MAX_KEY_DIM = 256
"""Of a head, for which fla's kernels have registers."""

_FORWARD, _BACKWARD = "chunk_gated_delta_rule_fwd_h", "chunk_gated_delta_rule_bwd_dhu"
_FORWARD_KERNEL = "chunk_gated_delta_rule_fwd_kernel_h_blockdim64"
_BACKWARD_KERNEL = "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64"
_ARGUMENTS = {
    _FORWARD: "k w u g gk initial_state output_final_state chunk_size save_new_value state_v_first "
    "cu_seqlens cu_seqlens_cpu chunk_indices chunk_offsets",
    _BACKWARD: "q k w do dv g gk h0 dht scale state_v_first cu_seqlens chunk_size chunk_indices "
    "chunk_offsets use_graph",
    _FORWARD_KERNEL: "k v w v_new g gk h h0 ht cu_seqlens chunk_offsets T H HV K V BT BV USE_G "
    "USE_GK USE_INITIAL_STATE STORE_FINAL_STATE SAVE_NEW_VALUE STATE_V_FIRST IS_VARLEN",
    _BACKWARD_KERNEL: "q k w g gk dht dh0 do dh dv dv2 cu_seqlens chunk_offsets scale T H HV K V "
    "BT BV USE_G USE_GK USE_INITIAL_STATE USE_FINAL_STATE_GRADIENT STATE_V_FIRST IS_VARLEN",
}
"""What the functions and the kernels of `chunk_delta_h` that are used here take."""


def difference() -> str | None:
    """Return what differs from the fla that this module is written for, or None."""
    for name, expected in _ARGUMENTS.items():
        function = getattr(chunk_delta_h, name, None)
        if function is None:
            return f"{name} is missing"
        if name.endswith("blockdim64"):
            actual = function.arg_names
        else:
            actual = list(inspect.signature(function).parameters)
            if inspect.unwrap(function) is function:
                return f"{name} takes no backends (is FLA_DISABLE_BACKEND_DISPATCH=1 set?)"
        if actual != expected.split():
            return f"{name} takes ({', '.join(actual)}), expected ({', '.join(expected.split())})"
    return None


class _Call:
    """A call of a rule along a tree: its levels, and what of fla the backend has stood in for."""

    def __init__(self, levels: Levels) -> None:
        self.levels = levels
        self.replaced: str | None = None
        self.gradient: Tensor | None = None

    def check(self, name: str) -> None:
        """Raise unless the backend has stood in for a function since the last check."""
        replaced, self.replaced = self.replaced, None
        if replaced != name:
            raise RuntimeError(
                f"fla has not called {name} as the tested versions do, so the state "
                "has not followed the tree"
            )


# By the tensor that fla hands through, and no longer than it lives.
_calls = WeakTensorKeyDictionary()


def along_levels(name: str, levels: Levels, sequences: Sequence[Tensor], **options: Any) -> Tensor:
    """Return what a rule gives for tokens in the order of `levels`, ``(tokens, heads, dim)``.

    Args:
        name: one of `RULES`.
        sequences: queries, keys, values, decays and rates, ``(tokens, heads, ..)`` each.
        options: further arguments of the rule; it gets those that it knows, as by transformers.
    """
    known = {option: x for option, x in options.items() if option in _OPTIONS[name]}
    query, key, value, decay, rate = (x[None] for x in sequences)
    state = (levels.num_segments, value.shape[2], key.shape[3], value.shape[3])
    starts = torch.zeros(state, dtype=torch.float32, device=value.device)
    of_levels = dict(
        initial_state=starts,
        cu_seqlens=levels.cu_seqlens,
        cu_seqlens_cpu=levels.cu_seqlens_cpu,
        chunk_size=levels.chunk_size,
    )
    call = _calls[starts] = _Call(levels)
    try:
        out, _ = RULES[name](query, key, value, decay, rate, **known | of_levels)
    finally:
        del _calls[starts]
    call.check(_FORWARD)
    if out.grad_fn is not None:
        _follow_backward(out.grad_fn, call)
    return out[0]


def _follow_backward(node: torch.autograd.graph.Node, call: _Call) -> None:
    def begin(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("fla's delta rules can't be differentiated twice")
        # A tensor that nothing else has, and that fla takes as it is.
        call.gradient = gradients[0].detach().contiguous()
        _calls[call.gradient] = call
        return (call.gradient, *gradients[1:])

    def end(*_: tuple[Tensor, ...]) -> None:
        assert call.gradient is not None
        del _calls[call.gradient]
        call.gradient = None
        call.check(_BACKWARD)

    node.register_prehook(begin)
    node.register_hook(end)


@register("common")
class TreeBackend(BaseBackend):
    """Replaces the functions that carry states, in the calls of `along_levels`."""

    backend_type = "onepass_tree"
    priority = -1  # before all of fla's

    def chunk_gated_delta_rule_fwd_h_verifier(
        self, *_: Any, initial_state: Tensor | None = None, **__: Any
    ) -> tuple[bool, str | None]:
        """Return whether this is a call of `along_levels`, and why not."""
        return initial_state is not None and initial_state in _calls, "no tree"

    def chunk_gated_delta_rule_bwd_dhu_verifier(
        self, *_: Any, do: Tensor, **__: Any
    ) -> tuple[bool, str | None]:
        """Return whether this is the backward pass of such a call, and why not."""
        return do in _calls, "no tree"

    def chunk_gated_delta_rule_fwd_h(
        self,
        k: Tensor,
        w: Tensor,
        u: Tensor,
        g: Tensor | None = None,
        gk: Tensor | None = None,
        *,
        initial_state: Tensor,
        chunk_size: int,
        state_v_first: bool,
        **_: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """Return the states in which chunks begin, and the new values.

        Fills `initial_state`, ``(segments, heads, key_dim, value_dim)`` float32.
        """
        call: _Call = _calls[initial_state]
        call.replaced = _FORWARD
        kernel = getattr(chunk_delta_h, _FORWARD_KERNEL)
        ends = torch.empty_like(initial_state)
        h = k.new_empty(1, call.levels.num_chunks, *initial_state.shape[1:])
        v_new = torch.empty_like(u)
        for level in call.levels.levels:
            if level.parents is not None:
                torch.index_select(ends, 0, level.parents, out=initial_state[level.continuing])
            # All levels begin in states and give the ones at their end, though the first and the
            # last need not: so they share one kernel, compiled and tuned once.
            kernel[_grid(u, level)](
                k=k,
                v=u,
                w=w,
                v_new=v_new,
                g=g,
                gk=gk,
                h=h,
                h0=initial_state[level.segments],
                ht=ends[level.segments],
                **_common(k, u, level, chunk_size, state_v_first),
            )
        return h, v_new, None

    def chunk_gated_delta_rule_bwd_dhu(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        do: Tensor,
        dv: Tensor,
        g: Tensor | None = None,
        gk: Tensor | None = None,
        *,
        h0: Tensor,
        scale: float,
        chunk_size: int,
        state_v_first: bool,
        **_: Any,
    ) -> tuple[Tensor, None, Tensor]:
        """Return the gradients of the states in which chunks begin, and those of the values."""
        call: _Call = _calls[do]
        call.replaced = _BACKWARD
        kernel = getattr(chunk_delta_h, _BACKWARD_KERNEL)
        dstarts, dends = torch.empty_like(h0), torch.zeros_like(h0)
        dh = q.new_empty(1, call.levels.num_chunks, *h0.shape[1:])
        dv2 = torch.empty_like(dv)
        for level in reversed(call.levels.levels):
            kernel[_grid(do, level)](
                q=q,
                k=k,
                w=w,
                g=g,
                gk=gk,
                dht=dends[level.segments],
                dh0=dstarts[level.segments],
                do=do,
                dh=dh,
                dv=dv,
                dv2=dv2,
                scale=scale,
                **_common(k, do, level, chunk_size, state_v_first),
            )
            if level.parents is not None:
                dends.index_add_(0, level.parents, dstarts[level.continuing])
        return dh, None, dv2


def _grid(values: Tensor, level: Level) -> Callable[[dict[str, Any]], tuple[int]]:
    heads, value_dim = values.shape[2:]
    num_segments = level.segments.stop - level.segments.start
    return lambda meta: (-(-value_dim // meta["BV"]) * num_segments * heads,)


def _common(
    k: Tensor, values: Tensor, level: Level, chunk_size: int, state_v_first: bool
) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    return dict(
        cu_seqlens=level.cu_seqlens,
        chunk_offsets=level.chunk_offsets,
        T=k.shape[1],
        H=k.shape[2],
        HV=values.shape[2],
        K=k.shape[3],
        V=values.shape[3],
        BT=chunk_size,
        STATE_V_FIRST=state_v_first,
    )
