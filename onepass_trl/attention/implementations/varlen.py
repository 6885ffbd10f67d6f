"""Tree attention by variable-length flash attention, the kernels that torch itself brings.

A row is cut into chains: at each fork the heaviest child continues its parent's chain, the others
begin chains of their own. A chain is causal in itself and sees all of the path above it, so it is
one sequence of a variable-length call: its tokens are the queries, the path above it and the chain
itself are the keys, aligned at their ends. A conversation of N turns has N chains, of which the
trunk is the first, and one for each fork copy. The price is memory for the keys and values of the
paths, which are gathered again in the backward pass.

The kernels are FlashAttention 2, or what `torch.nn.attention.activate_flash_attention_impl` has
put in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from onepass_trl.attention.implementations.base import (
    Call,
    Implementation,
    ImplStatus,
    refuse_blocks,
)
from onepass_trl.attention.remembered import Remembered

OLDEST_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256
# "auto" leaves rows whose chains gather more than this to FlexAttention, for the memory.
MAX_KEYS_PER_TOKEN = 8
DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 8  # of head sizes

Indices = NDArray[np.int64]


class PositionsError(ValueError):
    """Positions in which a window isn't a number of tokens along the pass."""


class Chains(NamedTuple):
    """The chains of a batch of rows, as sequences of a variable-length call.

    Tokens are numbered through the batch: token i of row b is ``b * seq + i``.

    Attributes:
        queries: ``(batch * seq,)``, the tokens, chain by chain.
        keys: ``(num_keys,)``, of each chain the path above it and its own tokens.
        query_ends: ``(num_chains,)``, where in `queries` the chains end.
        key_ends: ``(num_chains,)``, likewise in `keys`.
    """

    queries: Indices
    keys: Indices
    query_ends: Indices
    key_ends: Indices


def chains_of(visible_end: NDArray[np.int32], positions: NDArray[np.int32] | None = None) -> Chains:
    """Return the chains of a batch of rows.

    Args:
        visible_end: ``(batch, seq)``.
        positions: ``(batch, seq)``, given for a window, which counts steps along a chain.

    Raises:
        PositionsError: a position is not one more than that of the token before it in its pass.

    >>> chains = chains_of(np.array([[6, 2, 6, 5, 5, 6]], dtype=np.int32))
    >>> for name, value in chains._asdict().items():
    ...     print(name, value)
    queries [0 2 3 4 1 5]
    keys [0 2 3 4 0 1 0 2 5]
    query_ends [4 5 6]
    key_ends [4 6 9]
    """
    seq = visible_end.shape[1]
    queries: list[Indices] = []
    keys: list[Indices] = []
    for b, ends in enumerate(visible_end):
        for above, chain in _row_chains(ends.astype(np.int64)):
            path = np.concatenate([above, chain])
            if positions is not None:
                _check_steps(positions[b, path[max(len(above) - 1, 0) :]], b)
            queries.append(chain + b * seq)
            keys.append(path + b * seq)
    none = [np.empty(0, dtype=np.int64)]
    return Chains(
        np.concatenate(queries or none),
        np.concatenate(keys or none),
        np.cumsum([len(chain) for chain in queries], dtype=np.int64),
        np.cumsum([len(path) for path in keys], dtype=np.int64),
    )


def _check_steps(positions: NDArray[np.int32], row: int) -> None:
    if (np.diff(positions) != 1).any():
        raise PositionsError(
            f"impl='varlen' counts a window in tokens along a pass, and the positions of row {row} "
            "don't go up by one from token to token: use impl='flex'"
        )


def _row_chains(ends: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield the path above each chain of a row, and the chain's tokens."""
    index = np.arange(ends.size)
    if not ends.size:
        return
    # The next token of each token's chain: its first child, then the heaviest.
    heir = np.where(ends > index + 1, index + 1, -1)
    begins = np.flatnonzero(np.concatenate([[True], ends[:-1] <= index[1:]]))
    for begin, path in _paths_above(ends, begins):
        if path.size:
            parent = path[-1]
            first = heir[parent]
            if ends[begin] - begin > ends[first] - first:
                heir[parent] = begin
    before = np.full(ends.size, -1)
    before[heir[heir >= 0]] = np.flatnonzero(heir >= 0)
    chain = np.empty(ends.size, dtype=np.int64)
    heads: list[int] = []
    borders = np.flatnonzero(np.concatenate([[True], before[1:] != index[:-1], [True]]))
    for begin, end in pairwise(borders.tolist()):
        if before[begin] < 0:
            chain[begin:end] = len(heads)
            heads.append(begin)
        else:
            chain[begin:end] = chain[before[begin]]
    tokens = np.split(np.argsort(chain, kind="stable"), np.bincount(chain).cumsum()[:-1])
    for (_, path), of_chain in zip(_paths_above(ends, heads), tokens, strict=True):
        yield path, of_chain


def _paths_above(ends: Indices, tokens: Iterable[int]) -> Iterator[tuple[int, Indices]]:
    """Yield each token of a row, given in order, and the tokens before it that it sees."""
    root = 0
    for token in tokens:
        if ends[root] <= token:
            root = token  # a tree's first token is seen by all of it
        yield token, root + np.flatnonzero(ends[root:token] > token)


class Sequences(NamedTuple):
    """`Chains` on the device, as the kernels take them."""

    queries: Tensor
    keys: Tensor
    query_starts: Tensor
    """``(num_chains + 1,)`` int32."""
    key_starts: Tensor
    most_queries: int
    most_keys: int


# All layers of a forward pass share their sequences.
_sequences: Remembered[Sequences] = Remembered()


def _sequences_of(call: Call) -> Sequences:
    """Return the sequences of a call's rows.

    Raises:
        PositionsError: the window of the kernels can't be that of the positions.
    """
    visible_end, positions = call.visible_end.detach(), call.positions
    others = () if positions is None else (positions,)
    make = partial(make_sequences, visible_end, positions)
    return _sequences.get(call.visible_end, others, None, make)


def make_sequences(visible_end: Tensor, positions: Tensor | None) -> Sequences:
    """Return the chains of rows as the kernels take them, found on the host.

    Args:
        visible_end: ``(batch, seq)`` int32.
        positions: ``(batch, seq)`` int32, given for a window.

    Raises:
        PositionsError: the window of the kernels can't be that of the positions.
    """
    chains = chains_of(
        visible_end.cpu().numpy(), None if positions is None else positions.cpu().numpy()
    )
    query_starts, key_starts = (
        np.concatenate([[0], ends]) for ends in (chains.query_ends, chains.key_ends)
    )

    def on_device(x: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(x).to(visible_end.device)

    return Sequences(
        on_device(chains.queries),
        on_device(chains.keys),
        on_device(query_starts.astype(np.int32)),
        on_device(key_starts.astype(np.int32)),
        int(np.diff(query_starts).max()),
        int(np.diff(key_starts).max()),
    )


def _status() -> ImplStatus:
    if not torch.cuda.is_available():
        return ImplStatus("varlen", True, (), "torch sees no CUDA device")
    if torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return ImplStatus("varlen", True, (), "FlashAttention needs compute capability 8.0")
    detail = f"torch's variable-length FlashAttention, up to {MAX_KEYS_PER_TOKEN} keys a token"
    return ImplStatus("varlen", True, ("cuda",), detail)


def _suits(call: Call) -> bool:
    if call.q.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if call.visible_begin is not None or _unsupported(call) is not None:
        return False
    try:
        sequences = _sequences_of(call)
    except PositionsError:
        return False
    return sequences.keys.numel() <= MAX_KEYS_PER_TOKEN * sequences.queries.numel()


def _check(call: Call) -> None:
    if call.q.device.type != "cuda":
        raise ValueError(
            f"impl='varlen' and q is on {call.q.device}: torch has these kernels for CUDA devices. "
            "Use impl='auto'"
        )
    refuse_blocks("varlen", call)
    reason = _unsupported(call)
    if reason is not None:
        raise ValueError(f"impl='varlen': {reason}; use impl='flex'")


def _unsupported(call: Call) -> str | None:
    """Return why torch's kernels can't run a call on a CUDA device; None if they can."""
    if torch.cuda.get_device_capability(call.q.device) < OLDEST_CAPABILITY:
        return "FlashAttention needs compute capability 8.0"
    if call.q.dtype not in DTYPES:
        return f"q is {call.q.dtype}, expected {' or '.join(map(str, DTYPES))}"
    if max(call.q.shape[3], call.v.shape[3]) > MAX_HEAD_DIM:
        return f"head sizes go up to {MAX_HEAD_DIM}, got {call.q.shape[3]} and {call.v.shape[3]}"
    if call.v.shape[3] > call.q.shape[3]:
        return f"d_v is {call.v.shape[3]}, expected at most d_qk, {call.q.shape[3]}"
    if call.softcap is not None:
        return f"it has no softcap and got {call.softcap}"
    return None


@torch.compiler.disable(reason="the chains of a row are found on the host: use impl='flex'")
def _run(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    if 0 in q.shape[:3]:
        lse = q.new_zeros(q.shape[:3], dtype=torch.float32)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    sequences = _sequences_of(call)
    return _VarlenAttention.apply(q, k, v, call.sinks, sequences, call.scale, call.window)


class _VarlenAttention(torch.autograd.Function):
    """Attention of `Sequences`. The keys and values of the paths are gathered twice, not kept.

    A sink takes probability and gives no value: it changes the output and lse, and backward of the
    kernels, which knows the probabilities by lse and the output, is right with the changed ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        sequences: Sequences,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        batch, _, seq, _ = q.shape
        arguments = _kernel_arguments(sequences, window)
        out, lse, *state = torch.ops.aten._flash_attention_forward(
            *_gathered(q, k, v, sequences), *arguments, False, scale=scale, **_window(window)
        )
        if sinks is not None:
            remaining = torch.sigmoid(lse - sinks[:, None])
            out = (out * remaining.T[..., None]).to(out.dtype)
            lse = torch.logaddexp(lse, sinks[:, None])
        ctx.save_for_backward(q, k, v, sinks, out, lse, *state[:2])
        ctx.sequences, ctx.scale, ctx.window = sequences, scale, window
        ctx.set_materialize_grads(False)
        in_rows = torch.empty_like(out[..., : v.shape[3]])
        in_rows[sequences.queries] = out[..., : v.shape[3]]
        lse_in_rows = torch.empty_like(lse.T)
        lse_in_rows[sequences.queries] = lse.T
        lse_in_rows = lse_in_rows.unflatten(0, (batch, seq)).transpose(1, 2)
        return in_rows.unflatten(0, (batch, seq)).transpose(1, 2), lse_in_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlse is not None:
            raise RuntimeError(
                "torch's variable-length kernels have no gradient through lse: use impl='flex'"
            )
        assert dout is not None
        q, k, v, sinks, out, lse, *state = ctx.saved_tensors
        sequences: Sequences = ctx.sequences
        dout = _tokens(dout, out.shape[-1])[sequences.queries]
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout,
            *_gathered(q, k, v, sequences),
            out,
            lse,
            *_kernel_arguments(sequences, ctx.window),
            *state,
            scale=ctx.scale,
            **_window(ctx.window),
        )
        dsinks = None
        if sinks is not None:
            delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            dsinks = -(torch.exp(sinks - lse.T) * delta).sum(0).to(sinks.dtype)
        in_rows = torch.empty_like(dq)
        in_rows[sequences.queries] = dq
        return (
            _like(in_rows, q),
            *(_like(_added_up(dx, sequences, lse.dtype), x) for dx, x in ((dk, k), (dv, v))),
            dsinks,
            None,
            None,
            None,
        )


def _kernel_arguments(sequences: Sequences, window: int | None) -> tuple[Any, ...]:
    """Return what both kernels take after their tensors: sequences, dropout, causality."""
    lengths = (sequences.query_starts, sequences.key_starts)
    return (*lengths, sequences.most_queries, sequences.most_keys, 0.0, window is None)


def _window(window: int | None) -> dict[str, int]:
    """Return how far the kernels look to both sides; a causal mask needs no window."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _gathered(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, ...]:
    """Return q, k and v of all sequences, ``(num_tokens, heads, head_dim)`` each, of one size."""
    width = -(-q.shape[3] // _ALIGNMENT) * _ALIGNMENT
    places = (sequences.queries, sequences.keys, sequences.keys)
    return tuple(_tokens(x, width)[at] for x, at in zip((q, k, v), places, strict=True))


def _tokens(x: Tensor, width: int) -> Tensor:
    """Return ``(batch, heads, seq, head_dim)`` as ``(batch * seq, heads, width)``, padded by 0."""
    return pad(x.transpose(1, 2).flatten(0, 1), (0, width - x.shape[3]))


def _added_up(gradient: Tensor, sequences: Sequences, dtype: torch.dtype) -> Tensor:
    """Return the gradient of each token: the sum of those of its gathered copies, in `dtype`.

    By atomic additions on CUDA devices, unless ``torch.use_deterministic_algorithms(True)``.
    """
    shape = (sequences.queries.numel(), *gradient.shape[1:])
    return gradient.new_zeros(shape, dtype=dtype).index_add_(0, sequences.keys, gradient.to(dtype))


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """Return a gradient of tokens in the shape and dtype of their tensor."""
    batch, _, seq, head_dim = x.shape
    rows = gradient[..., :head_dim].to(x.dtype).unflatten(0, (batch, seq))
    return rows.transpose(1, 2)


VARLEN = Implementation("varlen", _status, _check, _run, _suits)
