"""Runs the CUDA kernels on the CPU emulator (emulator.h), with the arguments of the op."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.attention.cases import Case

CSRC = Path(__file__).parents[2] / "csrc"
sys.path.insert(0, str(CSRC / "cuda"))
import cuda_build  # noqa: E402

HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
FUSED_HEAD_DIMS = {
    "sm80": ((32, 32), (64, 64), (96, 96), (128, 128)),
    "sm90": ((64, 64), (128, 128)),
}
"""Head sizes of which all gradients are computed at once."""
GUARD = 64
"""Rows of NaN around every operand: what a kernel must not read and must not write."""


Family = Literal["sm80", "sm80 in order", "sm90", "sm90 in order"]
"""Portable or Hopper; blocks add to dq in any order, or in the same one every time."""
_MAJOR: dict[Family, int] = {"sm80": 8, "sm80 in order": 8, "sm90": 9, "sm90 in order": 9}
"""Compute capability at which a family is taken."""
_PADDING = 128
"""Queries of whole pairs of tiles: what scratch is made for."""


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((f"stride{i}", ctypes.c_int64) for i in range(3))]


class _Scoring(ctypes.Structure):
    _fields_ = [
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int32),
    ]


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "seq")),
        ("scoring", _Scoring),
        *((name, ctypes.c_void_p) for name in ("visible_end", "positions", "plan", "sinks")),
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
    ]


class _BackwardParams(ctypes.Structure):
    _fields_ = [
        *_Params._fields_,
        *((name, _Tensor) for name in ("dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dlse", "statistics", "dsinks")),
        *((name, ctypes.c_void_p) for name in ("dq_sums", "dq_order")),
        ("group_parts", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("dk_parts", "dv_parts")),
    ]


class _PlanParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "seq", "window")),
        *((name, ctypes.c_void_p) for name in ("visible_end", "positions", "plan")),
    ]


def build(csrc: Path, head_dims: Sequence[tuple[int, int]]) -> Path:
    """Return the path of the kernels in a folder of sources, compiled unless they are there."""
    compiler = shutil.which("g++")
    assert compiler is not None, "the tests compile C++, so a compiler is there"
    here = Path(__file__).parent
    table = cuda_build.head_dims_header(cuda_build.passes_of(head_dims, hopper=True))
    sources = sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cu*"), *here.glob("em*")])
    digest = hashlib.sha256(table.encode() + b"".join(path.read_bytes() for path in sources))
    built = Path(tempfile.gettempdir()) / f"onepass-emulated-{digest.hexdigest()[:16]}.so"
    if built.exists():
        return built
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "head_dims.h").write_text(table)
        command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Werror"]
        command += ["-Wno-unknown-pragmas", "-DONEPASS_EMULATE"]
        command += [f"-I{path}" for path in (folder, here, csrc / "cuda")]
        partial = Path(folder, built.name)
        subprocess.run([*command, str(here / "emulated.cpp"), "-o", str(partial)], check=True)
        shutil.move(partial, built)
    return built


@functools.cache
def library() -> ctypes.CDLL:
    """Return the emulated kernels of this repository."""
    return load(build(CSRC, HEAD_DIMS))


def load(path: Path) -> ctypes.CDLL:
    """Return what `build` has built."""
    loaded = ctypes.CDLL(str(path))
    loaded.onepass_plan_size.restype = ctypes.c_int64
    loaded.onepass_dq_order_size.restype = ctypes.c_int64
    assert loaded.onepass_size_of_params() == ctypes.sizeof(_Params)
    assert loaded.onepass_size_of_backward_params() == ctypes.sizeof(_BackwardParams)
    return loaded


def set_seed(seed: int) -> None:
    """Draw another order in which the emulated warps run."""
    library().onepass_seed(ctypes.c_uint64(seed))


class Counters(NamedTuple):
    """What the emulated kernels have done."""

    matrix_loads: int
    bank_conflicts: int
    products: int
    """16 x 8 x 16, of one warp each."""


def counters() -> Counters:
    """Return what has been counted since the last call."""
    values = (ctypes.c_int64 * 3)()
    library().onepass_counters(values)
    return Counters(*values)


def guarded(like: Tensor, width: int) -> Tensor:
    """Return a NaN tensor of the shape of `like` and `width` columns, with NaN rows around it."""
    batch, heads, seq, _ = like.shape
    storage = torch.full((batch * seq + 2 * GUARD, heads, width), torch.nan, dtype=like.dtype)
    return storage[GUARD:-GUARD].view(batch, seq, heads, width).transpose(1, 2)


def assert_guards_untouched(x: Tensor) -> None:
    """Fail if a kernel has written around a tensor of `guarded`."""
    base = x._base
    assert base is not None
    assert base[:GUARD].isnan().all()
    assert base[-GUARD:].isnan().all()


def make_plan(visible_end: Tensor, positions: Tensor | None, window: int) -> Tensor:
    """Return the plan ``(batch, plan_size)`` int32 as the kernels make it."""
    batch, seq = visible_end.shape
    size = library().onepass_plan_size(seq)
    # Not yet written entries are found by their value.
    plan = torch.full((batch, size), -(2**30), dtype=torch.int32)
    counts = torch.full_like(plan, -(2**30))
    params = _PlanParams(batch, seq, window, *map(_pointer, (visible_end, positions, plan)))
    library().onepass_plan(ctypes.byref(params), ctypes.c_void_p(counts.data_ptr()))
    return plan


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_end: Tensor,
    *,
    scale: float,
    positions: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    family: Family = "sm80",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, lse, plan) of the emulated forward kernel."""
    plan = make_plan(visible_end, positions, window)
    out = guarded(q, v.shape[3])
    lse = torch.full(q.shape[:3], torch.nan)
    params = _Params()
    scoring = _Scoring(scale, softcap, window)
    _fill(params, q, k, v, out, lse, visible_end, positions, plan, sinks, scoring)
    assert library().onepass_forward(_MAJOR[family], *_kind(q, v), ctypes.byref(params))
    assert_guards_untouched(out)
    return out, lse, plan


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible_end: Tensor,
    plan: Tensor,
    *,
    scale: float,
    positions: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    family: Family = "sm80",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (dq, dk, dv, dsinks, dq_sums) of the emulated backward kernels."""
    gradients = tuple(guarded(x, x.shape[3]) for x in (q, k, v))
    rows = (*lse.shape[:2], -(-lse.shape[2] // _PADDING) * _PADDING)
    statistics = guarded(lse.new_empty(1, 1, math.prod(rows), 1), 2)
    dq_sums = dq_order = None
    if (q.shape[3], v.shape[3]) in FUSED_HEAD_DIMS[family.removesuffix(" in order")]:
        dq_sums = guarded(lse.new_empty(1, 1, math.prod(rows), 1), q.shape[3])
        if family.endswith("in order"):
            dq_order = torch.full((library().onepass_dq_order_size(*lse.shape),), -1).int()
    dsinks = None if sinks is None else torch.full_like(sinks, torch.nan)
    params = _BackwardParams()
    scoring = _Scoring(scale, softcap, window)
    _fill(params, q, k, v, out, lse, visible_end, positions, plan, sinks, scoring)
    for name, x in zip(("dout", "dq", "dk", "dv"), (dout, *gradients), strict=True):
        setattr(params, name, _tensor(x))
    params.dlse, params.statistics, params.dsinks = map(_pointer, (dlse, statistics, dsinks))
    params.dq_sums, params.dq_order = _pointer(dq_sums), _pointer(dq_order)
    params.group_parts = parts_of_group(q, k, dq_order is not None)
    parts = []
    if params.group_parts > 1:
        of_keys = (params.group_parts, *k.shape[:2], rows[2])
        like = lse.new_empty(1, 1, math.prod(of_keys), 1)
        parts = [guarded(like, x.shape[3]) for x in (k, v)]
        params.dk_parts, params.dv_parts = map(_pointer, parts)
    assert library().onepass_backward(_MAJOR[family], *_kind(q, v), ctypes.byref(params))
    for x in (*gradients, statistics, *parts, *([] if dq_sums is None else [dq_sums])):
        assert_guards_untouched(x)
    return *gradients, dsinks, dq_sums


def parts_of_group(q: Tensor, k: Tensor, in_order: bool) -> int:
    """Return into how many parts a backward pass cuts the query heads of a group."""
    batch, heads, seq, _ = q.shape
    return library().onepass_parts_of_group(batch, heads, k.shape[1], seq, in_order)


def parts_for_balance(blocks: int, group: int) -> int:
    """Return into how many parts the compiled kernels cut a group if they had `blocks` without."""
    return library().onepass_parts_for_balance(ctypes.c_int64(blocks), group)


def parts_in_order(kv_heads: int, group: int) -> int:
    """Return into how many parts they cut it at least if dq is added in order."""
    return library().onepass_parts_in_order(kv_heads, group)


def places(entries: int, heads: int) -> NDArray[np.int32]:
    """Return the entry and the head of every block of the compiled kernels, ``(blocks, 2)``, in the
    order in which they start.
    """
    found = np.empty((entries * heads, 2), np.int32)
    library().onepass_places(entries, heads, found.ctypes.data_as(ctypes.c_void_p))
    return found


def hopper_visits(visible_end: Tensor, positions: Tensor | None, window: int, keys: int) -> NDArray:
    """Return which tiles of 64 or 128 keys a Hopper forward pass tells its consumers to visit,
    ``(batch, blocks, tiles + 1)`` of (tile, seen, full) until tile is -1: blocks are of 128
    queries, and bit i of `seen` and `full` is that of 64 of them.
    """
    batch, seq = visible_end.shape
    plan = make_plan(visible_end, positions, window)
    shape = (batch, -(-seq // 128), -(-seq // keys) + 1)
    visit = np.dtype([(name, np.int32) for name in ("tile", "seen", "full", "padding")])
    visits = np.full(shape, 2**30, visit)
    params = _Params(batch=batch, seq=seq, scoring=_Scoring(window=window))
    params.visible_end, params.positions, params.plan = map(
        _pointer, (visible_end, positions, plan)
    )
    library().onepass_hopper_visits(
        ctypes.byref(params), keys, visits.ctypes.data_as(ctypes.c_void_p)
    )
    return visits


def walks(
    visible_end: Tensor,
    positions: Tensor | None = None,
    window: int = 0,
    *,
    queries: int = 64,
    keys: int = 128,
) -> list[NDArray]:
    """Return for each block of `keys`, in the order in which they start, the tiles of `queries`
    that it visits one after the other, as (tile, before): the block that adds to dq before it, as a
    number from 1, is 0 if there is none.
    """
    seq = visible_end.shape[1]
    walk = np.dtype([("tile", np.int32), ("before", np.int32)])
    found = np.full((-(-seq // keys), -(-seq // queries)), -1, walk)
    plan = make_plan(visible_end, positions, window)
    params = _BackwardParams(batch=1, heads=1, kv_heads=1, seq=seq, group_parts=1)
    params.scoring, params.plan = _Scoring(window=window), _pointer(plan)
    library().onepass_walks(
        ctypes.byref(params), queries, keys, found.ctypes.data_as(ctypes.c_void_p)
    )
    return [visited[visited["tile"] >= 0] for visited in found]


def guarded_copy(x: Tensor) -> Tensor:
    """Return x as models lay it out, between rows of NaN."""
    return guarded(x, x.shape[3]).copy_(x)


def run_forward(
    case: Case,
    dtype: torch.dtype,
    family: Family = "sm80",
    *,
    lay_out: Callable[[Tensor], Tensor] = guarded_copy,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a case, by the CUDA kernels of a family."""
    q, k, v, options = _arguments(case, dtype, family, lay_out)
    return forward(q, k, v, case.visible_end, **options)[:2]


def run(
    case: Case,
    dtype: torch.dtype,
    family: Family = "sm80",
    *,
    lay_out: Callable[[Tensor], Tensor] = guarded_copy,
    through_lse: bool = True,
    with_sums: bool = False,
) -> dict[str, Tensor]:
    """Return what `Case.run` returns, by the CUDA kernels, and ``"dq_sums"`` if asked."""
    q, k, v, options = _arguments(case, dtype, family, lay_out)
    out, lse, plan = forward(q, k, v, case.visible_end, **options)
    dout, dlse = lay_out(case.dout.to(dtype)), case.dlse.float() if through_lse else None
    dq, dk, dv, dsinks, sums = backward(
        dout, dlse, q, k, v, out, lse, case.visible_end, plan, **options
    )
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}
    if with_sums:
        results["dq_sums"] = sums
    return {name: x for name, x in results.items() if x is not None}


def _arguments(
    case: Case, dtype: torch.dtype, family: Family, lay_out: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    q, k, v = (lay_out(case.inputs[name].to(dtype)) for name in "qkv")
    window = case.options["window"] or 0
    options = {
        "scale": q.shape[3] ** -0.5,
        "positions": case.options["positions"] if window else None,
        "window": window,
        "softcap": case.options["softcap"] or 0.0,
        "sinks": case.inputs["sinks"].float() if "sinks" in case.inputs else None,
        "family": family,
    }
    return q, k, v, options


def _fill(
    params: _Params | _BackwardParams,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible_end: Tensor,
    positions: Tensor | None,
    plan: Tensor,
    sinks: Tensor | None,
    scoring: _Scoring,
) -> None:
    params.batch, params.heads, params.seq = q.shape[:3]
    params.kv_heads = k.shape[1]
    params.scoring = scoring
    params.visible_end, params.positions = _pointer(visible_end), _pointer(positions)
    params.plan, params.sinks, params.lse = _pointer(plan), _pointer(sinks), _pointer(lse)
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        setattr(params, name, _tensor(x))


def _tensor(x: Tensor) -> _Tensor:
    assert x.stride(3) == 1
    return _Tensor(x.data_ptr(), *x.stride()[:3])


def _pointer(x: Tensor | None) -> int | None:
    if x is None:
        return None
    assert x.is_contiguous()
    return x.data_ptr()


def _kind(q: Tensor, v: Tensor) -> tuple[bool, int, int]:
    assert q.dtype in (torch.bfloat16, torch.float16)
    return q.dtype == torch.bfloat16, q.shape[3], v.shape[3]
