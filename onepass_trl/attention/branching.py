"""Layers that carry state along the row, made to branch it at the nodes of a tree.

Linear attention (gated delta rule, Kimi delta attention, Mamba 2) and short convolutions compute a
token from what stands before it in the row; on a tree that has to be what stands before it in its
own pass. transformers computes both in functions of a modeling module, and hands them the keyword
arguments that the model gets. `branch_states` puts functions in their place that, with
`visible_end` among these,

- run the recurrence segment by segment, each from the state in which its parent segment ends;
- convolve along the row, and anew the few tokens at seams, with their own predecessors.

Without `visible_end` they are the original functions, so generation is what it was.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.activations import ACT2FN

from onepass_trl.attention.context_parallel import ContextParallel
from onepass_trl.attention.remembered import Remembered
from onepass_trl.visibility import check_visible_end

# Layers whose forward mixes tokens by the functions of `_REPLACEMENTS` only. Tested, each of them.
MIXERS = (
    "Qwen3NextGatedDeltaNet",
    "Qwen3_5GatedDeltaNet",
    "Qwen3_5MoeGatedDeltaNet",
    "OlmoHybridGatedDeltaNet",
    "KimiLinearDeltaAttention",
    "BailingHybridDeltaAttention",
    "NemotronHMamba2Mixer",
    "GraniteMoeHybridMambaLayer",
    "FalconH1Mixer",
    "BambaMixer",
    "Lfm2ShortConv",
    "Lfm2MoeShortConv",
    "Lfm3ShortConv",
)

Ints = NDArray[np.int64]


class Group(NamedTuple):
    """Segments of one length whose parents lie in groups before it: they run as one batch."""

    length: int
    begins: tuple[int, ...]
    """First token of each, counted over the whole batch."""
    parents: tuple[int, ...]
    """Last tokens of their parent segments; none for segments without one."""
    has_children: bool


class Seams(NamedTuple):
    """Tokens whose predecessors are not those that stand before them in the row."""

    tokens: Tensor
    """``(seams,)`` int64, counted over the whole batch."""
    predecessors: Tensor
    """``(seams, width)`` int64: the last `width` tokens of their passes, themselves the last of
    these; -1 before the beginning."""


class Branching:
    """How a batch of trees is cut into segments: runs of tokens that are each the only child of
    the one before.

    Args:
        visible_end: ``(batch, seq)`` integers, on any device.

    Raises:
        ValueError: a row is not a tree.
    """

    @torch.inference_mode(False)  # training may come to use it too
    def __init__(self, visible_end: Tensor) -> None:
        self._device = visible_end.device
        self._seq = visible_end.shape[1]
        rows = visible_end.cpu().numpy().astype(np.int64)
        for row in rows:
            check_visible_end(row.astype(np.int32))
        self.parents: Ints = np.concatenate(
            [_shifted(_parents(row), at * self._seq) for at, row in enumerate(rows)]
        )
        """``(batch * seq,)``: the token before each in its pass, -1 at the beginning."""
        self.groups = self._groups()
        self.sizes = [len(group.begins) * group.length for group in self.groups]
        """How many tokens each group has."""
        order = np.concatenate(
            [np.add.outer(group.begins, np.arange(group.length)).ravel() for group in self.groups]
        )
        self.order = self._tensor(order)
        """``(batch * seq,)`` int64: the tokens of the groups one after another."""
        self.place = self._tensor(np.argsort(order))
        """``(batch * seq,)`` int64: where each token lies in that order."""
        self._seams: dict[int, Seams] = {}

    @torch.inference_mode(False)
    def seams(self, width: int) -> Seams:
        """Return the seams of a causal convolution over `width` tokens."""
        if width not in self._seams:
            tokens = np.arange(len(self.parents))
            chain = [tokens]
            is_seam = np.zeros(len(tokens), bool)
            for distance in range(1, width):
                last = chain[-1]
                chain.append(np.where(last >= 0, self.parents[last], -1))
                before = np.where(tokens % self._seq >= distance, tokens - distance, -1)
                is_seam |= chain[-1] != before
            predecessors = np.stack(chain[::-1], axis=1)[is_seam]
            self._seams[width] = Seams(self._tensor(tokens[is_seam]), self._tensor(predecessors))
        return self._seams[width]

    def _groups(self) -> tuple[Group, ...]:
        num_tokens = len(self.parents)
        follows = self.parents == np.arange(num_tokens) - 1  # the token before it in the row
        follows[:1] = False
        is_begin = ~follows
        # A state is handed on at the end of a segment only.
        branched = self.parents[is_begin & (self.parents >= 0)]
        is_begin[branched + 1] = True
        begins = np.flatnonzero(is_begin)
        lengths = np.diff(begins, append=num_tokens)
        parents = self.parents[begins]
        segment_at_end = {end: at for at, end in enumerate(begins + lengths - 1)}
        level: list[int] = []
        members: dict[tuple[int, int], list[int]] = defaultdict(list)
        for segment, parent in enumerate(parents):
            level.append(0 if parent < 0 else level[segment_at_end[parent]] + 1)
            members[level[segment], int(lengths[segment])].append(segment)
        with_children = set(parents.tolist())
        groups = []
        for (depth, length), segments in sorted(members.items()):
            first = begins[segments]
            groups.append(
                Group(
                    length=length,
                    begins=tuple(first.tolist()),
                    parents=tuple(parents[segments].tolist()) if depth > 0 else (),
                    has_children=not with_children.isdisjoint((first + length - 1).tolist()),
                )
            )
        return tuple(groups)

    def _tensor(self, x: Ints) -> Tensor:
        return torch.from_numpy(x).to(self._device)


def _parents(ends: Ints) -> Ints:
    """Return the token before each token of a row in its pass, -1 at the beginning."""
    tokens = np.arange(len(ends))
    parents = tokens - 1
    # Elsewhere the token before still sees it.
    for token in np.flatnonzero(ends[:-1] == tokens[1:]) + 1:
        parent = parents[token - 1]
        while parent >= 0 and ends[parent] <= token:
            parent = parents[parent]
        parents[token] = parent
    return parents


def _shifted(parents: Ints, by: int) -> Ints:
    return np.where(parents >= 0, parents + by, -1)


# Of visible_end, so that layers share it.
_branchings: Remembered[Branching] = Remembered()


def _branching_of(visible_end: Tensor) -> Branching:
    return _branchings.get(visible_end, (), None, lambda: Branching(visible_end))


def _along_tree(
    visible_end: Tensor,
    run: Callable[..., tuple[Tensor, Tensor | None]],
    sequences: Sequence[Tensor],
    name: str,
    context_parallel: ContextParallel | None,
) -> Tensor:
    """Return what a recurrence gives along the passes of a tree, ``(batch, seq, ..)``.

    Args:
        visible_end: ``(batch, seq)``, of whole rows.
        run: called with segments of the sequences, ``(segments, length, ..)`` each, the states in
            which they begin (or None) and whether the states at their end are wanted.
        sequences: ``(batch, seq, heads, ..)`` each.
        name: of the recurrence, for errors.
        context_parallel: if the sequences and the result are pieces of rows.
    """
    if context_parallel is not None:
        sequences = context_parallel.to_whole_rows(name, *sequences)
    branching = _branching_of(visible_end)
    # Ordered and split once: the gradient of a piece taken by itself would be as long as the row.
    ordered = [x.flatten(0, 1).index_select(0, branching.order) for x in sequences]
    by_group = zip(*(x.split(branching.sizes) for x in ordered), strict=True)
    outputs: list[Tensor] = []
    states: dict[int, Tensor] = {}  # at the last tokens of segments
    for group, flat in zip(branching.groups, by_group, strict=True):
        pieces = [x.unflatten(0, (-1, group.length)) for x in flat]
        initial = torch.stack([states[token] for token in group.parents]) if group.parents else None
        out, final = run(pieces, initial, group.has_children)
        outputs.append(out.flatten(0, 1))
        if group.has_children:
            assert final is not None
            states |= {
                begin + group.length - 1: state
                for begin, state in zip(group.begins, final, strict=True)
            }
    out = torch.cat(outputs).index_select(0, branching.place).unflatten(0, visible_end.shape)
    return out if context_parallel is None else context_parallel.to_own_piece(out)


def _delta_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
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
        return _along_tree(visible_end, run, sequences, rule.__name__, context_parallel), None

    return branching


def _scan(scan: Callable[..., Any]) -> Callable[..., Any]:
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
        return _along_tree(visible_end, run, sequences, scan.__name__, context_parallel)

    return branching


def _fused(convolve_and_scan: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(convolve_and_scan)
    def branching(*args: Any, visible_end: Tensor | None = None, **kwargs: Any) -> Any:
        # None: the layer then calls the convolution and the scan apart.
        return convolve_and_scan(*args, **kwargs) if visible_end is None else None

    return branching


def _convolution(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(convolve)
    def branching(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        *,
        visible_end: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if visible_end is None:
            return convolve(hidden_states, weight, bias, activation=activation, **kwargs)
        if context_parallel is not None:  # as if channels were heads
            pieces = hidden_states.transpose(1, 2)
            (whole,) = context_parallel.to_whole_rows(convolve.__name__, pieces)
            hidden_states = whole.transpose(1, 2)
            weight = context_parallel.own_share(weight)
            bias = None if bias is None else context_parallel.own_share(bias)
        out = convolve(hidden_states, weight, bias, activation=None, **kwargs)
        seams = _branching_of(visible_end).seams(weight.shape[-1])
        tokens = hidden_states.transpose(1, 2).flatten(0, 1)  # (batch * seq, channels)
        before = tokens[seams.predecessors.clamp(min=0)]  # (seams, width, channels)
        before = before.masked_fill((seams.predecessors < 0)[..., None], 0)
        at_seams = (before * weight.T).sum(1)
        if bias is not None:
            at_seams = at_seams + bias
        rows = out.transpose(1, 2).flatten(0, 1)
        rows = rows.index_copy(0, seams.tokens, at_seams.to(rows.dtype))
        rows = rows.unflatten(0, visible_end.shape)
        if context_parallel is not None:
            rows = context_parallel.to_own_piece(rows)
        out = rows.transpose(1, 2)
        return out if activation is None else ACT2FN[activation](out)

    return branching


_FUSED = "mamba2_split_conv1d_scan_combined"
_REPLACEMENTS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _scan,
    _FUSED: _fused,
}


class _Reached(threading.local):
    """The functions that the layer which is running has called with visible_end."""

    def __init__(self) -> None:
        self.names: set[str] = set()


_reached = _Reached()


def is_mixer(module: nn.Module) -> bool:
    """Whether a module is a layer whose state can branch: of transformers, not of the same name."""
    kind = type(module)
    return kind.__name__ in MIXERS and kind.__module__.startswith("transformers.models.")


def layer_name(module: nn.Module) -> str:
    """Return the class and the number of a layer, for messages."""
    return f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"


def branch_states(model: nn.Module, before: Callable[..., Any]) -> None:
    """Make the layers of `MIXERS` in a model follow `visible_end`. Harmless to repeat.

    Args:
        model: any module.
        before: a forward pre-hook with keyword arguments for each of these layers.
    """
    for module in model.modules():
        if not is_mixer(module):
            continue
        names = _replace(sys.modules[type(module).__module__])
        if before not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_pre_hook(_forget_reached)
            module.register_forward_hook(
                functools.partial(_check_reached, names - {_FUSED}), with_kwargs=True
            )


def _replace(modeling: ModuleType) -> set[str]:
    """Replace a modeling module's functions unless they are, and return the names."""
    names = {name for name in _REPLACEMENTS if hasattr(modeling, name)}
    assert names, f"{modeling.__name__} has none of the functions that branch"
    for name in names:
        function = getattr(modeling, name)
        if not hasattr(function, "branches"):
            setattr(modeling, name, _noting(name, _REPLACEMENTS[name](function)))
    return names


def _noting(name: str, branching: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(branching)
    def noting(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("visible_end") is not None:
            _reached.names.add(name)
        return branching(*args, **kwargs)

    noting.branches = True  # type: ignore[attr-defined]
    return noting


def _forget_reached(*_: Any) -> None:
    _reached.names.clear()


def _check_reached(
    names: set[str], module: nn.Module, _: Any, kwargs: dict[str, Any], __: Any
) -> None:
    """Raise if a layer has computed with other functions: its state would not have branched."""
    missing = sorted(names - _reached.names)
    if kwargs.get("visible_end") is not None and missing:
        raise ValueError(
            f"{layer_name(module)} was given visible_end, but has not called "
            f"{' and '.join(missing)} of its modeling file with it, so its state has not followed "
            "the tree. Load the model without use_kernels=True"
        )
