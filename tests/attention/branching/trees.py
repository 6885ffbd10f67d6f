"""Random trees for tests of recurrences."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.attention.cases import random_visible_end


@st.composite
def trees(draw: st.DrawFn, longest: int = 90) -> Tensor:
    """Draw `visible_end` of one or two rows of random trees, ``(batch, seq)`` int32."""
    seq, batch = draw(st.integers(1, longest)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = [random_visible_end(seq, generator) for _ in range(batch)]
    return torch.tensor(rows, dtype=torch.int32)
