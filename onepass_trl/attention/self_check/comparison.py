"""What an implementation computes of a case, compared with the dense reference in float64.

An error is measured in units of what rounding works on: the same sums over absolute values. So a
wrong key counts the same wherever it is, next to the largest gradient of a row or far from it. The
limit is a small factor of the error of the dense reference in the dtype of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.ops import accumulation_dtype
from onepass_trl.attention.reference import dense_tree_attention, visibility_mask
from onepass_trl.attention.self_check.cases import Case

Run = Callable[[Call], tuple[Tensor, Tensor]]
Results = dict[str, Tensor]
"""out, lse, dq, dk, dv and, with sinks, dsinks."""

FACTOR = 2
"""A kernel may err so much more than the dense reference in its dtype ..."""
ALLOWED_EPS = 2
"""... and so much more, which has P and dS in float32 where kernels round them: half an eps each
for P, dS, the output in delta, and the result."""
LSE_LIMIT = 1e-4
"""Of lse, which is float32 and computed from float32 scores."""


def mistake_in(case: Case, run: Run, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what is wrong with what `run` computes of a case, None if nothing is.

    It runs three times: where additions may come in any order, and twice where they may not, which
    has to give the same bits.
    """
    exact = _results(case, _dense, torch.float64)
    eager = _results(case, _dense, dtype)
    magnitudes = _magnitudes(case, exact, dtype)
    limits = {
        name: FACTOR * float(_error(eager[name], exact[name], magnitudes[name]).max())
        + ALLOWED_EPS * torch.finfo(dtype).eps
        for name in exact
    } | {"lse": LSE_LIMIT}
    earlier: Results | None = None
    for deterministic in (False, True, True):
        _poison_memory(device)
        with deterministic_mode(deterministic):
            results = _results(case, run, dtype, device, case.copies)
        way = "with deterministic algorithms" if deterministic else "in the default mode"
        for name, result in results.items():
            expected, magnitude = (_repeated(x[name], name, case) for x in (exact, magnitudes))
            mistake = _mistake(result, expected, magnitude, limits[name])
            if mistake is not None:
                return f"{name} {mistake}: {case.name}, {way}"
            if deterministic and earlier and not torch.equal(result, earlier[name]):
                return f"{name} differs from run to run: {case.name}, {way}"
        earlier = results if deterministic else None
    return None


def _dense(call: Call) -> tuple[Tensor, Tensor]:
    return dense_tree_attention(**call._asdict())


def _results(
    case: Case,
    run: Run,
    dtype: torch.dtype,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
    copies: int = 1,
) -> Results:
    """Return the results of a case, repeated along the row, computed in `dtype` on a device."""

    def given(x: Tensor, dtype: torch.dtype) -> Tensor:
        tokens = x.transpose(1, 2)  # copied as they are laid out
        repeated = tokens.repeat(1, copies, *[1] * (x.ndim - 2))
        return repeated.to(device, dtype).transpose(1, 2)

    call = case.call
    leaves = {name: given(getattr(call, name), dtype).requires_grad_() for name in "qkv"}
    if call.sinks is not None:
        own = call.sinks.to(device, accumulation_dtype(dtype), copy=True)
        leaves["sinks"] = own.requires_grad_()
    seq = call.visible_end.shape[1]
    begins = torch.arange(copies, dtype=torch.int32).repeat_interleave(seq) * seq
    visible_end = (call.visible_end.repeat(1, copies) + begins).to(device)
    positions = call.positions
    if positions is not None:
        positions = positions.repeat(1, copies).to(device)
    repeated = call._asdict() | leaves | {"visible_end": visible_end, "positions": positions}
    out, lse = run(Call(**repeated))
    outputs, gradients = [out], [given(case.dout, out.dtype)]
    if case.dlse is not None:
        outputs, gradients = [out, lse], [*gradients, given(case.dlse, lse.dtype)]
    of_leaves = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    results = {"out": out.detach(), "lse": lse.detach()}
    results |= {f"d{name}": x for name, x in zip(leaves, of_leaves, strict=True)}
    return {name: x.cpu() for name, x in results.items()}


def _repeated(x: Tensor, name: str, case: Case) -> Tensor:
    """Return what a row of copies has where one of them has x."""
    if name == "dsinks":
        return x * case.copies
    return x.repeat(1, 1, case.copies, *[1] * (x.ndim - 3))


def _magnitudes(case: Case, exact: Results, dtype: torch.dtype) -> Results:
    """Return the sums that the results are, over absolute values; 1 for lse.

    At least the smallest normal number of `dtype`, for factors too: what is less is rounded to
    multiples of a part of it.
    """
    call = case.call
    group = call.q.shape[1] // call.k.shape[1]
    q, dout = call.q.abs(), case.dout.abs()
    k, v = (x.repeat_interleave(group, dim=1) for x in (call.k, call.v))
    smallest = torch.finfo(dtype).smallest_normal
    visible = visibility_mask(call.visible_end, call.positions, call.window)[:, None]
    scores, slope = call.scale * (call.q @ k.mT), torch.ones(())
    if call.softcap is not None:
        capped = torch.tanh(scores / call.softcap)
        scores, slope = call.softcap * capped, 1 - capped.square()
    lse = exact["lse"][..., None]
    probabilities = torch.exp(scores - lse).clamp_min(smallest) * visible
    delta = (dout * exact["out"].abs()).sum(-1, keepdim=True)
    if case.dlse is not None:
        delta = delta + case.dlse.abs()[..., None]
    dscores = probabilities * (dout @ v.abs().mT + delta) * slope
    dscores = call.scale * dscores.clamp_min(smallest) * visible

    def of_kv_heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    result = {
        "out": probabilities @ v.abs(),
        "lse": torch.ones_like(exact["lse"]),
        "dq": dscores @ k.abs(),
        "dk": of_kv_heads(dscores.mT @ q),
        "dv": of_kv_heads(probabilities.mT @ dout),
    }
    if call.sinks is not None:
        of_sink = torch.exp(call.sinks[:, None, None] - lse)
        result["dsinks"] = (of_sink * delta).sum((0, 2, 3))
    return {name: x.clamp_min(smallest) for name, x in result.items()}


def _error(actual: Tensor, expected: Tensor, magnitude: Tensor) -> Tensor:
    return (actual.double() - expected).abs() / magnitude


def _mistake(actual: Tensor, expected: Tensor, magnitude: Tensor, limit: float) -> str | None:
    errors = _error(actual, expected, magnitude)
    worst = errors.argmax()  # to which a NaN is larger than any number
    error = float(errors.flatten()[worst])
    if error <= limit:
        return None
    place = tuple(map(int, torch.unravel_index(worst, errors.shape)))
    got, wanted = float(actual[place]), float(expected[place])
    return (
        f"is {got:.4g} instead of {wanted:.4g} at {place}, off by {error:.2g} of what is added "
        f"up (limit {limit:.2g})"
    )


@contextmanager
def deterministic_mode(enabled: bool = True) -> Iterator[None]:
    """Ask for the same bits every time, or, by default of torch, for what is fast."""
    before = torch.get_deterministic_debug_mode()
    # A warning is enough for what torch itself can't do so.
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _poison_memory(device: torch.device) -> None:
    """Leave NaN in the memory that the next tensors are likely to get."""
    held = [torch.full((1 << bits,), torch.nan, device=device) for bits in range(9, 23)]
    del held
