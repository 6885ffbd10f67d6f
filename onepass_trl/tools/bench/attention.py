"""Attention of one layer on one row: our implementations against SDPA and FlexAttention."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from onepass_trl.attention import available_impls, tree_attention
from onepass_trl.attention.implementations.flex import build_block_mask
from onepass_trl.attention.implementations.registry import Impl
from onepass_trl.attention.reference import visibility_mask
from onepass_trl.tools.bench.timing import available_bytes, min_and_median, reason, synchronize
from onepass_trl.tools.bench.workload import AttentionShape
from onepass_trl.visibility import num_executed_pairs, num_visible_pairs

DENSE_MASK, CAUSAL, FLEX = "sdpa dense mask", "sdpa causal", "flex"
CAUSAL_NOTE = "computes something else: every token sees all before it"
FLEX_NOTE = "compiled; FlexAttention has no backward on a CPU"


class Inputs(NamedTuple):
    """Random tensors of one row: ``q``, ``k``, ``v`` and ``dout`` ``(1, heads, seq, head_dim)``.

    ``visible_end`` is ``(1, seq)`` int32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    visible_end: Tensor


class Peer(NamedTuple):
    """Something to compare.

    Attributes:
        run: returns attention, a tensor.
        note: a remark on its figures, if there is one.
        has_backward: whether it can be differentiated.
        is_tree: whether it computes tree attention, so that its output can be compared.
        num_bytes: a lower bound of the memory it takes.
    """

    run: Callable[[], Any]
    note: str | None = None
    has_backward: bool = True
    is_tree: bool = True
    num_bytes: int = 0


def make_inputs(
    visible_end: NDArray[np.int32], shape: AttentionShape, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Return random inputs of a row, always the same, which require gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, d: int) -> Tensor:
        x = torch.randn(1, visible_end.size, heads, d, generator=generator)
        return x.to(device, dtype).transpose(1, 2)

    q, k, v = (
        normal(heads, d).requires_grad_()
        for heads, d in (
            (shape.heads, shape.d_qk),
            (shape.kv_heads, shape.d_qk),
            (shape.kv_heads, shape.d_v),
        )
    )
    row = torch.from_numpy(visible_end)[None].to(device)
    return Inputs(q, k, v, normal(shape.heads, shape.d_v), row)


def make_peers(x: Inputs) -> dict[str, Peer]:
    """Return what can be compared on the device of the inputs, ours first."""
    device, heads, seq = x.q.device.type, x.q.shape[1], x.q.shape[2]
    pairs = seq * seq
    usable = [status.name for status in available_impls() if device in status.devices]
    peers = {
        f"onepass {impl}": Peer(
            partial(tree_attention, x.q, x.k, x.v, x.visible_end, impl=cast("Impl", impl)),
            # Scores, masked scores, probabilities, and the gradients of two of them.
            num_bytes=5 * 4 * heads * pairs if impl == "dense" else 0,
        )
        for impl in usable
        if impl != "flex"
    }
    if "flex" in usable:
        peers[FLEX] = Peer(partial(tree_attention, x.q, x.k, x.v, x.visible_end, impl="flex"))
    elif device == "cpu":
        peers[FLEX] = Peer(_compiled_flex(x), FLEX_NOTE, has_backward=False)
    # The mask, and the floating one that SDPA makes of it.
    num_bytes = pairs * (1 + x.q.element_size())
    peers[DENSE_MASK] = Peer(_dense_mask_sdpa(x), num_bytes=num_bytes)
    causal = partial(_sdpa, x, is_causal=True)
    return {**peers, CAUSAL: Peer(causal, CAUSAL_NOTE, is_tree=False)}


def _compiled_flex(x: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: list[Callable[[], Tensor]] = []
    # It refuses inputs that require gradients even if none are requested.
    q, k, v = x.q.detach(), x.k.detach(), x.v.detach()

    def run() -> Tensor:
        if not compiled:
            mask = build_block_mask(
                x.visible_end, None, None
            )  # built once, as the layers of a model share it
            function = torch.compile(flex_attention, dynamic=True)
            has_groups = q.shape[1] != k.shape[1]
            compiled.append(partial(function, q, k, v, block_mask=mask, enable_gqa=has_groups))
        return compiled[0]()

    return run


def _sdpa(x: Inputs, **options: Any) -> Tensor:
    k, v, group = x.k, x.v, x.q.shape[1] // x.k.shape[1]
    if x.q.device.type != "cpu" and "attn_mask" in options:
        # The backends that take a mask don't support groups of heads there.
        k, v, group = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), 1
    return F.scaled_dot_product_attention(x.q, k, v, enable_gqa=group > 1, **options)


def _dense_mask_sdpa(x: Inputs) -> Callable[[], Tensor]:
    mask: list[Tensor] = []  # made once, as the layers of a model share it

    def run() -> Tensor:
        if not mask:
            mask.append(visibility_mask(x.visible_end)[:, None])
        return _sdpa(x, attn_mask=mask[0])

    return run


def measure_attention(
    visible_end: NDArray[np.int32],
    shape: AttentionShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    peers: Sequence[str] | None = None,
    budget_s: float = 60.0,
) -> list[dict[str, Any]]:
    """Return a flat result for each peer; all are timed in turn on the same inputs.

    Times are in milliseconds, ``times_onepass`` the time of forward and backward as a multiple of
    the first peer's. ``difference`` is the largest difference of the output from the first peer's.
    A peer that cannot run has None for figures and says why in ``note``.

    Args:
        visible_end: ``(seq,)`` int32 of the row, without a window.
        shape: of the layer.
        dtype: of the inputs.
        device: where to run.
        repeats: how often each is timed, after one run to warm up.
        peers: names of those to run; all by default.
        budget_s: a peer that has taken this many seconds, warm-up included, is not run again.

    Raises:
        ValueError: if there is no peer of a name.
    """
    x = make_inputs(visible_end, shape, dtype, device)
    chosen = make_peers(x)
    if peers is not None:
        unknown = [name for name in peers if name not in chosen]
        if unknown:
            raise ValueError(
                f"there is no peer {unknown[0]!r}, expected one of {', '.join(chosen)}"
            )
        chosen = {name: peer for name, peer in chosen.items() if name in peers}
    common = _shape_columns(visible_end, shape, dtype)
    runs = _run_in_turn(chosen, x, repeats, budget_s)
    first = runs[next(iter(chosen))].times
    own = min((forward + backward for forward, backward in first if backward), default=None)
    return [{"implementation": name, **common, **_columns(run, own)} for name, run in runs.items()]


@dataclass
class _Run:
    """The runs of a peer: seconds of forward and backward, and of everything it did."""

    note: str | None
    times: list[tuple[float, float | None]] = field(default_factory=list)
    spent: float = 0.0
    difference: float | None = None


def _run_in_turn(
    peers: dict[str, Peer], x: Inputs, repeats: int, budget_s: float
) -> dict[str, _Run]:
    """Run all peers once to warm up, then `repeats` times."""
    runs = {name: _Run(peer.note) for name, peer in peers.items()}
    running, expected = dict(peers), None
    for number in range(repeats + 1):
        for name, peer in list(running.items()):
            run = runs[name]
            begin = time.perf_counter()
            try:
                check_memory(peer, x.q.device)
                out, forward, backward = time_once(peer, x)
            except (RuntimeError, ValueError) as error:  # out of memory, not supported
                runs[name] = _Run(f"not measured: {reason(error)}")
                del running[name]
                continue
            run.spent += time.perf_counter() - begin
            if number > 0:
                run.times.append((forward, backward))
                if run.spent > budget_s:
                    del running[name]
            elif peer.is_tree:
                expected = out if expected is None else expected
                run.difference = (out.float() - expected.float()).abs().max().item()
    return runs


class MemoryLimitError(RuntimeError):
    """Something would need more memory than is free."""


def check_memory(peer: Peer, device: torch.device) -> None:
    """Raise before the process is killed: a CPU grants memory first and fails later."""
    free = available_bytes(device) if device.type == "cpu" else None
    if free is not None and peer.num_bytes > free:
        raise MemoryLimitError(
            f"needs {peer.num_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )


def time_once(peer: Peer, x: Inputs) -> tuple[Tensor, float, float | None]:
    """Return the output and the seconds of forward and backward (None without a backward)."""
    device = x.q.device
    synchronize(device)
    begin = time.perf_counter()
    with torch.set_grad_enabled(peer.has_backward):
        out = peer.run()
    synchronize(device)
    middle = time.perf_counter()
    if not peer.has_backward:
        return out, middle - begin, None
    torch.autograd.grad(out, (x.q, x.k, x.v), x.dout)
    synchronize(device)
    return out.detach(), middle - begin, time.perf_counter() - middle


def _columns(run: _Run, own: float | None) -> dict[str, Any]:
    """Return the figures of a peer, given the smallest total time of the first in seconds."""
    forward = [1e3 * seconds for seconds, _ in run.times]
    backward = [1e3 * seconds for _, seconds in run.times if seconds is not None]
    total = [sum(both) for both in zip(forward, backward, strict=True)] if backward else []
    columns: dict[str, Any] = {"repeats": len(run.times)}
    for name, values in (("forward", forward), ("backward", backward), ("total", total)):
        columns |= min_and_median(name, "ms", values)
    ratio = min(total) / (1e3 * own) if total and own is not None else None
    return {**columns, "times_onepass": ratio, "difference": run.difference, "note": run.note}


def _shape_columns(
    visible_end: NDArray[np.int32], shape: AttentionShape, dtype: torch.dtype
) -> dict[str, Any]:
    seq, useful = visible_end.size, num_visible_pairs(visible_end)
    return {
        "seq": seq,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.d_qk,
        "dtype": str(dtype).removeprefix("torch."),
        "useful_share_of_causal": useful / (seq * (seq + 1) / 2),
        "executed_over_useful": num_executed_pairs(visible_end) / useful,
    }
