"""The check finds what is wrong, and nothing else: by the CPU kernel and mistakes planted in it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.implementations.cpu import CPU
from onepass_trl.attention.reference import dense_tree_attention
from onepass_trl.attention.self_check.cases import hostile_cases
from onepass_trl.attention.self_check.comparison import Run, mistake_in

from .fused import run_fused

DEVICE = torch.device("cpu")
BF16 = torch.bfloat16


def first_mistake(run: Run, dtype=BF16, head_dims=(32, 16)) -> str | None:
    mistakes = (mistake_in(case, run, DEVICE, dtype) for case in hostile_cases(dtype, head_dims))
    return next(filter(None, mistakes), None)


def test_nothing_is_wrong_with_the_cpu_kernel():
    assert first_mistake(CPU.run) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rounding_of_fused_kernels_is_no_mistake(dtype):
    for case in hostile_cases(dtype, (64, 32)):
        case = case._replace(copies=1)  # the simulation materializes all scores
        assert mistake_in(case, run_fused, DEVICE, dtype) is None


def given(run: Run = CPU.run, **changes: Callable[[Call], object]) -> Run:
    """Return an implementation on arguments that a mistake has changed."""
    return lambda call: run(
        call._replace(**{name: change(call) for name, change in changes.items()})
    )


def dense(call: Call) -> tuple[Tensor, Tensor]:
    """Attention that takes `visible_end` as it is, also if it is no tree."""
    return dense_tree_attention(**call._asdict())


def with_gradient(name: str, change: Callable[[Tensor], Tensor]) -> Run:
    """Return the CPU kernel with a mistake in a gradient."""

    def changed(call: Call) -> Tensor:
        x = getattr(call, name)
        if x is None:
            return None
        x = x.view_as(x)
        x.register_hook(change)
        return x

    return given(**{name: changed})


def with_output(change: Callable[[Tensor, Tensor, Call], tuple[Tensor, Tensor]]) -> Run:
    """Return the CPU kernel with a mistake in its output or lse."""
    return lambda call: change(*CPU.run(call), call)


def scaled(index, factor: float) -> Callable[[Tensor], Tensor]:
    """Return a function that scales a part of a tensor."""

    def change(x: Tensor) -> Tensor:
        factors = torch.ones_like(x)
        with contextlib.suppress(IndexError):  # in a row that is too short
            factors[index] = factor
        return x * factors

    return change


def only_if(deterministic: bool, wrong: Run) -> Run:
    def run(call: Call) -> tuple[Tensor, Tensor]:
        right = torch.are_deterministic_algorithms_enabled() != deterministic
        return CPU.run(call) if right else wrong(call)

    return run


def without_a_key(call: Call) -> Tensor:
    """No query but itself sees a key."""
    ends = call.visible_end.clone()
    ends[:, KEY : KEY + 1] = KEY + 1
    return ends


def other_group(x: Tensor) -> Tensor:
    """Heads that are assigned to heads of keys in turns instead of in groups."""
    return x.roll(1, dims=1)


def noisy(out: Tensor, lse: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Other bits each time, all of them right."""
    return out + 0.01 * torch.rand_like(out) * out.abs(), lse


QUERY, KEY = 70, 66
NO_DQ_OF_A_TILE = with_gradient("q", scaled((slice(None), slice(None), slice(64, 128)), 0))
MISTAKES = {
    "causal instead of a tree": (
        given(visible_end=lambda call: torch.full_like(call.visible_end, call.q.shape[2])),
        "out",
    ),
    "ends a token late": (
        given(dense, visible_end=lambda call: (call.visible_end + 1).clamp(max=call.q.shape[2])),
        "out",
    ),
    "the first row's tree for all": (
        given(visible_end=lambda call: call.visible_end[:1].expand(2, -1)),
        "out",
    ),
    "a key that is not seen": (given(dense, visible_end=without_a_key), "out"),
    "no window": (given(window=lambda call: None), "out"),
    "a window one longer": (given(window=lambda call: call.window and call.window + 1), "out"),
    "a window of tokens of the row": (
        given(
            positions=lambda call: (
                None
                if call.positions is None
                else torch.arange(call.q.shape[2], dtype=torch.int32).expand(2, -1)
            )
        ),
        "out",
    ),
    "no softcap": (given(softcap=lambda call: None), "out"),
    "another softcap": (given(softcap=lambda call: call.softcap and 1.1 * call.softcap), "out"),
    "no sinks": (
        given(sinks=lambda call: call.sinks if call.sinks is None else call.sinks - 99),
        "out",
    ),
    "another head's sink": (
        given(sinks=lambda call: None if call.sinks is None else call.sinks.roll(1)),
        "out",
    ),
    "another scale": (given(scale=lambda call: 1.05 * call.scale), "lse"),
    "another head's keys": (given(k=lambda call: other_group(call.k)), "out"),
    "one output": (
        with_output(lambda out, lse, call: (scaled((0, 0, QUERY, 3), 1.1)(out), lse)),
        "out",
    ),
    "a NaN": (with_output(lambda out, lse, call: (scaled((1, 0, -1), torch.nan)(out), lse)), "out"),
    "lse without sinks": (
        with_output(
            lambda out, lse, call: (
                out,
                lse
                if call.sinks is None
                else torch.log((lse.exp() - call.sinks[:, None].exp()).clamp_min(1e-6)),
            )
        ),
        "lse",
    ),
    "lse in bits": (with_output(lambda out, lse, call: (out, lse * 1.4427)), "lse"),
    "dk of one key": (with_gradient("k", scaled((0, 0, KEY), 0.8)), "dk"),
    "dk of the last key": (with_gradient("k", scaled((slice(None), slice(None), -1), 0)), "dk"),
    "dv of one key": (with_gradient("v", scaled((0, 0, KEY), 0.9)), "dv"),
    "dq of one query": (with_gradient("q", scaled((0, 0, QUERY), 0.8)), "dq"),
    "dq of a tile": (NO_DQ_OF_A_TILE, "dq"),
    "dsinks of one head": (with_gradient("sinks", scaled(1, 0.9)), "dsinks"),
    "no gradient through lse": (
        with_output(lambda out, lse, call: (out, lse.detach() + 0 * lse)),
        "d",
    ),
    "wrong in the default mode": (only_if(False, NO_DQ_OF_A_TILE), "dq .* in the default mode"),
    "wrong with deterministic algorithms": (
        only_if(True, NO_DQ_OF_A_TILE),
        "dq .* with deterministic algorithms",
    ),
    "other bits each time": (only_if(True, with_output(noisy)), "out differs from run to run"),
}


@pytest.mark.parametrize(("run", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found(run, message):
    mistake = first_mistake(run)
    assert mistake is not None
    assert re.match(message, mistake), mistake


def test_what_is_said_of_a_mistake():
    mistake = first_mistake(only_if(True, with_gradient("k", scaled((0, 0, KEY), 0))))
    number = r"-?\d+(\.\d+)?"
    assert re.fullmatch(
        rf"dk is -?0 instead of {number} at \(0, 0, {KEY}, \d+\), off by {number} of what is added "
        rf"up \(limit {number}\): single tokens, 3:3 heads, window 1, softcap 3.0, sinks, with "
        "deterministic algorithms",
        mistake,
    )


def test_only_a_repeated_row_shows_what_long_rows_get_wrong():
    """As a counter that overflows, or a block that starts when the device is full."""
    late = with_output(lambda out, lse, call: (scaled((..., slice(1000, 1010), 0), 2)(out), lse))
    assert "packed" in first_mistake(late)
