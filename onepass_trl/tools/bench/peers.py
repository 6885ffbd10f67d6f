"""Attention to compare on the same random inputs: our implementations, SDPA, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from onepass_trl.attention import available_impls, tree_attention
from onepass_trl.attention.implementations.flex import build_block_mask
from onepass_trl.attention.implementations.varlen import make_sequences
from onepass_trl.attention.reference import visibility_mask
from onepass_trl.tools.bench.workload import AttentionShape

DENSE_MASK, CAUSAL, FLEX = "sdpa dense mask", "sdpa causal", "flex"
CAUSAL_NOTE = "computes something else: every token sees all before it"
FLEX_NOTE = "compiled; FlexAttention has no backward on a CPU"


class Inputs(NamedTuple):
    """Random tensors of one row: ``q``, ``k``, ``v`` and ``dout`` ``(1, heads, seq, head_dim)``.

    ``visible_end`` and ``positions`` are ``(1, seq)`` int32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    visible_end: Tensor
    positions: Tensor | None


class Peer(NamedTuple):
    """Something to compare.

    Attributes:
        run: returns attention, a tensor.
        prepare: builds what all layers of a batch share, before `run` can; None for nothing.
        note: a remark on its figures, if there is one.
        has_backward: whether it can be differentiated.
        is_tree: whether it computes tree attention, so that its output can be compared.
        num_bytes: a lower bound of the memory it takes.
        same_bits: whether it runs under ``torch.use_deterministic_algorithms``.
    """

    run: Callable[[], Tensor]
    prepare: Callable[[], object] | None = None
    note: str | None = None
    has_backward: bool = True
    is_tree: bool = True
    num_bytes: int = 0
    same_bits: bool = False


def make_inputs(
    visible_end: NDArray[np.int32],
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    positions: NDArray[np.int32] | None = None,
) -> Inputs:
    """Return random inputs of a row, always the same, which require gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, d: int) -> Tensor:
        x = torch.randn(1, visible_end.size, heads, d, generator=generator, device=device)
        return x.to(dtype).transpose(1, 2)

    def row(values: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))[None].to(device)

    q, k, v = (
        normal(heads, d).requires_grad_()
        for heads, d in (
            (shape.heads, shape.d_qk),
            (shape.kv_heads, shape.d_qk),
            (shape.kv_heads, shape.d_v),
        )
    )
    dout = normal(shape.heads, shape.d_v)
    return Inputs(q, k, v, dout, row(visible_end), None if positions is None else row(positions))


def make_peers(x: Inputs, window: int | None = None) -> dict[str, Peer]:
    """Return what can be compared on the device of the inputs, ours first."""
    device, heads, seq = x.q.device.type, x.q.shape[1], x.q.shape[2]
    pairs = seq * seq
    positions = None if window is None else x.positions
    usable = [status.name for status in available_impls() if device in status.devices]

    def tree(impl: str) -> Callable[[], Any]:
        options: dict[str, Any] = {"positions": positions, "window": window, "impl": impl}
        return partial(tree_attention, x.q, x.k, x.v, x.visible_end, **options)

    peers = {
        f"onepass {impl}": Peer(
            tree(impl),
            # Scores, masked scores, probabilities, and the gradients of two of them.
            num_bytes=5 * 4 * heads * pairs if impl == "dense" else 0,
        )
        for impl in usable
        if impl != "flex"
    }
    if "cuda" in usable:
        plan = partial(torch.ops.onepass.tree_plan, x.visible_end, positions, window or 0)
        ours = peers["onepass cuda"] = peers["onepass cuda"]._replace(prepare=plan)
        peers["onepass cuda, same bits"] = ours._replace(same_bits=True)
    if "varlen" in usable:
        sequences = partial(make_sequences, x.visible_end, positions)
        peers["onepass varlen"] = peers["onepass varlen"]._replace(prepare=sequences)
    build_blocks = partial(build_block_mask, x.visible_end, positions, window)
    if "flex" in usable:
        peers[FLEX] = Peer(tree("flex"), build_blocks)
    elif device == "cpu":
        peers[FLEX] = _compiled_flex(x, build_blocks)
    peers[DENSE_MASK] = _dense_mask_sdpa(x, positions, window)
    backends: dict[str, SDPBackend | None] = {CAUSAL: None}
    if device == "cuda":
        backends = {
            f"{CAUSAL} cuDNN": SDPBackend.CUDNN_ATTENTION,
            f"{CAUSAL} FA2": SDPBackend.FLASH_ATTENTION,
        }
    for name, backend in backends.items():
        run = partial(_sdpa, x, x.k, x.v, backend, is_causal=True)
        peers[name] = Peer(run, note=CAUSAL_NOTE, is_tree=False)
    return peers


def _compiled_flex(x: Inputs, build_blocks: Callable[[], BlockMask]) -> Peer:
    """Return FlexAttention on a CPU, where `tree_attention` would run it eagerly."""
    made: list[BlockMask] = []
    # It refuses inputs that require gradients even if none are requested.
    q, k, v = x.q.detach(), x.k.detach(), x.v.detach()
    # Once per shape: with dynamic ones, the C++ that torch 2.13 writes for a CPU may not compile.
    # Whole, so that it ends with an error, not eagerly, where torch gives up compiling it again.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def prepare() -> None:
        made[:] = [build_blocks()]

    def run() -> Tensor:
        return compiled(q, k, v, block_mask=made[0], enable_gqa=q.shape[1] != k.shape[1])

    return Peer(run, prepare, FLEX_NOTE, has_backward=False)


def _dense_mask_sdpa(x: Inputs, positions: Tensor | None, window: int | None) -> Peer:
    mask: list[Tensor] = []

    def prepare() -> None:
        mask[:] = [visibility_mask(x.visible_end, positions, window)[:, None]]

    def run() -> Tensor:
        k, v, group = x.k, x.v, x.q.shape[1] // x.k.shape[1]
        if x.q.device.type != "cpu":  # backends with a mask don't support groups of heads there
            k, v = (y.repeat_interleave(group, dim=1) for y in (k, v))
        return _sdpa(x, k, v, None, attn_mask=mask[0])

    # The mask, and the floating one that SDPA makes of it.
    num_bytes = x.q.shape[2] ** 2 * (1 + x.q.element_size())
    return Peer(run, prepare, num_bytes=num_bytes)


def _sdpa(x: Inputs, k: Tensor, v: Tensor, backend: SDPBackend | None, **options: Any) -> Tensor:
    has_groups = x.q.shape[1] != k.shape[1]
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(x.q, k, v, enable_gqa=has_groups, **options)
