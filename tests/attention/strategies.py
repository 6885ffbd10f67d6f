"""Hypothesis draws cases of `tests.attention.cases`."""

from __future__ import annotations

from hypothesis import strategies as st

from .cases import Case, Shape, make_case


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Every option with every other, and sequence lengths on both sides of the kernels' tiles."""
    kv_heads = draw(st.integers(1, 2))
    shape = Shape(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        seq=draw(st.one_of(st.integers(0, 20), st.sampled_from([63, 64, 65, 129, 200, 331]))),
        d_qk=draw(st.sampled_from([1, 5, 16, 24, 64])),
        d_v=draw(st.sampled_from([1, 7, 16, 40])),
    )
    return make_case(
        shape,
        window=draw(st.one_of(st.none(), st.integers(1, 100))),
        softcap=draw(st.one_of(st.none(), st.sampled_from([1.0, 30.0]))),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
