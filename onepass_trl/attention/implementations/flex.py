"""Tree attention through FlexAttention, for CUDA devices without a kernel that is trusted.

"flex_flash" is the same by FlexAttention's backend FLASH, the kernels of flash-attn-4, which nobody
gets unasked.

Compiled on CUDA, with dynamic shapes, so that rows of new lengths do not compile again. On other
devices it runs eagerly, which materializes all scores and on a CPU has no backward: only good for
comparing it with the other implementations.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from onepass_trl.attention.implementations.base import (
    Call,
    Implementation,
    ImplStatus,
    check_dtype,
    refuse_blocks,
)
from onepass_trl.attention.remembered import Remembered
from onepass_trl.versions import FLEX_FLASH as FLASH_SINCE
from onepass_trl.visibility import Tiles, coverage

logger = logging.getLogger(__name__)

BLOCK = 128
FLASH_QUERY_BLOCK = 256
FLASH_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of the compiled function. A model has a handful: see `_compiled`.
MAX_VARIANTS = 64
# Bytes a block of threads needs for the default tiles of heads of 256. Smaller chips (8.6, 8.9,
# 12.0) have 99 KiB.
_MEMORY_OF_DEFAULT_TILES = 160 * 1024
_TILE_OPTIONS = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")

# All layers of a forward pass share their block masks.
_block_masks: Remembered[BlockMask] = Remembered()


def _status() -> ImplStatus:
    if torch.cuda.is_available():
        return ImplStatus("flex", True, ("cuda",), "compiled FlexAttention")
    return ImplStatus("flex", True, (), "torch sees no CUDA device")


def _suits(call: Call) -> bool:
    return call.q.device.type == "cuda"


def _check(call: Call) -> None:
    check_dtype("flex", call, DTYPES)


def _run(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    if 0 in q.shape[:3]:
        lse = q.new_zeros(q.shape[:3], dtype=torch.float32)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    compute: Callable[..., Any] = flex_attention
    if q.device.type == "cuda":
        compute = partial(_compiled, kernel_options=_kernel_options(call))
    out, aux = compute(
        q,
        k,
        v,
        score_mod=None if call.softcap is None else _softcap_mod(call.softcap),
        block_mask=_remembered_block_mask(call),
        scale=call.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return (out, aux.lse) if call.sinks is None else add_sinks(out, aux.lse, call.sinks)


def _flash_status() -> ImplStatus:
    if not torch.cuda.is_available():
        return ImplStatus("flex_flash", True, (), "torch sees no CUDA device")
    reason = _missing_for_flash(torch.cuda.get_device_capability())
    detail = reason or "FlexAttention by the kernels of flash-attn-4"
    return ImplStatus("flex_flash", True, () if reason else ("cuda",), detail)


def _check_flash(call: Call) -> None:
    if call.q.device.type != "cuda":
        raise ValueError(f"impl='flex_flash' and q is on {call.q.device}: use impl='auto'")
    check_dtype("flex_flash", call, FLASH_DTYPES)
    refuse_blocks("flex_flash", call)
    reason = _missing_for_flash(torch.cuda.get_device_capability(call.q.device))
    if reason is None and call.sinks is not None:
        reason = "sinks need a gradient through lse, which flash-attn-4 doesn't have"
    if reason is None and torch.are_deterministic_algorithms_enabled():
        reason = "its backward isn't deterministic, which torch.use_deterministic_algorithms asks"
    if reason is not None:
        raise ValueError(f"impl='flex_flash': {reason}; use impl='flex'")


def _missing_for_flash(capability: tuple[int, int]) -> str | None:
    """Return what the backend FLASH lacks on a device, None if nothing."""
    if not FLASH_SINCE.installed:
        return f"it needs torch {FLASH_SINCE.version} and this is {torch.__version__}"
    if capability[0] not in (9, 10):
        number = ".".join(map(str, capability))
        return f"it needs compute capability 9.0 or 10.x and the device has {number}"
    # The second is looked for in the first, which has to be there.
    if not all(map(importlib.util.find_spec, ("flash_attn", "flash_attn.cute"))):
        return "flash-attn-4 isn't installed (pip install --pre flash-attn-4)"
    return None


def _run_flash(call: Call) -> tuple[Tensor, Tensor]:
    if 0 in call.q.shape[:3]:
        return _run(call)
    out, aux = _compiled(**_flash_arguments(call), kernel_options={"BACKEND": "FLASH"})
    return out, aux.lse


def _flash_arguments(call: Call) -> dict[str, Any]:
    """Return the arguments of FlexAttention: the backend FLASH takes no number of Python's."""
    softcap = None
    if call.softcap is not None:
        softcap = torch.full((), call.softcap, dtype=torch.float32, device=call.q.device)
    return {
        "query": call.q,
        "key": call.k,
        "value": call.v,
        "score_mod": None if softcap is None else _softcap_mod(softcap),
        "block_mask": _remembered_block_mask(call, for_flash=True),
        "scale": call.scale,
        "enable_gqa": call.q.shape[1] != call.k.shape[1],
        "return_aux": AuxRequest(lse=True),
    }


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(out, lse)` with one more logit per head, of value zero; differentiable.

    Args:
        out: ``(batch, heads, seq, d_v)``.
        lse: ``(batch, heads, seq)`` float.
        sinks: ``(heads,)``.
    """
    sinks = sinks.to(lse.dtype)[None, :, None]
    remaining = torch.sigmoid(lse - sinks)  # the probability that the sink leaves
    return (out * remaining[..., None]).to(out.dtype), torch.logaddexp(lse, sinks)


@cache
def _flex_attention(backend: str = "inductor") -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)


def _compiled(*args: Any, **kwargs: Any) -> Any:
    """Call FlexAttention compiled: an error, never eager, which would materialize all scores.

    Variants compile for themselves: with a window, a softcap, gradients, several rows, few keys.
    torch gives up after 8, and runs eagerly after that unless the graph has to be whole.
    """
    if torch.compiler.is_compiling():
        return flex_attention(*args, **kwargs)
    with torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS):
        return _flex_attention()(*args, **kwargs)


def _kernel_options(call: Call) -> dict[str, Any]:
    """Return what the kernels can't know: each query sees itself, and what memory there is."""
    if call.q.dtype == torch.float32:
        _warn_of_float32()
    options: dict[str, Any] = {"ROWS_GUARANTEED_SAFE": True}
    properties = torch.cuda.get_device_properties(call.q.device)
    # Only NVIDIA's have it; tiles of AMD's kernels are chosen otherwise.
    memory = getattr(properties, "shared_memory_per_block_optin", _MEMORY_OF_DEFAULT_TILES)
    if max(call.q.shape[3], call.v.shape[3]) > 128 and memory < _MEMORY_OF_DEFAULT_TILES:
        options |= dict.fromkeys(_TILE_OPTIONS, 32) | {"num_stages": 1}
    return options


@cache
def _warn_of_float32() -> None:
    logger.warning(
        "FlexAttention is slow in float32 (its backward works on tiles of 16 x 16): train in "
        "bfloat16, with bf16=True"
    )


def _softcap_mod(softcap: float | Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _mask_mod(
    visible_end: Tensor,
    positions: Tensor | None,
    window: int | Tensor | None,
    visible_begin: Tensor | None,
) -> Callable[..., Tensor]:
    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        begin = key if visible_begin is None else visible_begin[b, key]
        return (begin <= query) & (query < visible_end[b, key])

    if window is None:
        return mask_mod
    assert positions is not None

    def window_mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_window = positions[b, query] - positions[b, key] < window
        return mask_mod(b, h, query, key) & in_window

    return window_mask_mod


def _remembered_block_mask(call: Call, *, for_flash: bool = False) -> BlockMask:
    positions = None if call.window is None else call.positions
    others = tuple(x for x in (positions, call.visible_begin) if x is not None)
    make = partial(
        build_block_mask,
        # An alias: the mask must not keep the tensor alive with which it goes.
        call.visible_end.detach(),
        positions,
        call.window,
        for_flash=for_flash,
        visible_begin=call.visible_begin,
    )
    key = (call.window, for_flash, call.visible_begin is None)
    return _block_masks.get(call.visible_end, others, key, make)


def build_block_mask(
    visible_end: Tensor,
    positions: Tensor | None,
    window: int | None,
    *,
    for_flash: bool = False,
    visible_begin: Tensor | None = None,
) -> BlockMask:
    """Return the `BlockMask` of a row from the ranges of its blocks: O((seq / 128)^2).

    Args:
        visible_end: ``(batch, seq)`` int32.
        positions: ``(batch, seq)`` int32, or None without a window.
        window: None for none.
        for_flash: whether it is for the backend FLASH, which takes blocks of 256 queries, and the
            window as a tensor.
        visible_begin: ``(batch, seq)`` int32, or None if each token's is its own index.
    """
    seq = visible_end.shape[1]
    query_block = FLASH_QUERY_BLOCK if for_flash else BLOCK
    queries, keys = (
        _blocks(visible_end, positions, size, visible_begin) for size in (query_block, BLOCK)
    )
    visited, full = coverage(queries, keys, window)
    limit: int | Tensor | None = window
    if for_flash and window is not None:
        limit = torch.full((), window, dtype=torch.int32, device=visible_end.device)
    return BlockMask.from_kv_blocks(
        *_block_list(visited & ~full),
        *_block_list(full),
        BLOCK_SIZE=(query_block, BLOCK),
        mask_mod=_mask_mod(visible_end, positions, limit, visible_begin),
        seq_lengths=(seq, seq),
    )


def _blocks(
    visible_end: Tensor, positions: Tensor | None, size: int, visible_begin: Tensor | None
) -> Tiles:
    """Return the blocks of `size` tokens, the last of which may be shorter."""
    seq = visible_end.shape[1]
    first = torch.arange(0, seq, size, device=visible_end.device)
    last = torch.clamp(first + size, max=seq) - 1
    min_end, max_end = _block_ranges(visible_end, size)
    tiles = Tiles(first, last, min_end, max_end)
    if positions is not None:
        low, high = _block_ranges(positions, size)
        tiles = replace(tiles, min_position=low, max_position=high)
    if visible_begin is not None:
        low, high = _block_ranges(visible_begin, size)
        tiles = replace(tiles, min_begin=low, max_begin=high)
    return tiles


def _block_ranges(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the minimum and maximum of each block, ``(batch, num_blocks)`` each."""
    padded = torch.cat([x, x[:, -1:].expand(-1, -x.shape[1] % size)], dim=1)
    blocks = padded.view(x.shape[0], -1, size)
    return blocks.amin(-1), blocks.amax(-1)


def _block_list(visited: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block visits, and the blocks, visited first."""
    counts = visited.sum(-1, dtype=torch.int32)
    order = torch.argsort(visited.to(torch.int8), dim=-1, descending=True, stable=True)
    return counts[:, None], order[:, None].to(torch.int32)


FLEX = Implementation("flex", _status, _check, _run, _suits)
FLEX_FLASH = Implementation("flex_flash", _flash_status, _check_flash, _run_flash)
