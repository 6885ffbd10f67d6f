"""What the tests of this folder run on.

With ONEPASS_TEST_GPU_DRY_RUN=1 that is the CPU and its kernel, so that the tests themselves are
tested where there is no GPU; what only a GPU can do is left out then.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from onepass_trl.attention import cuda_library
from tests.attention.cases import Case, Shape, make_case

DRY_RUN = os.environ.get("ONEPASS_TEST_GPU_DRY_RUN") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"
IMPL = "cpu" if DRY_RUN else "cuda"
BF16 = torch.bfloat16


class Kernel(NamedTuple):
    """One of the kernels that the library holds."""

    dtype: torch.dtype
    d_qk: int
    d_v: int

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{self.d_qk}-{self.d_v}"

    def shape(self, batch: int, heads: int, kv_heads: int, seq: int) -> Shape:
        return Shape(batch, heads, kv_heads, seq, self.d_qk, self.d_v)


def built_kernels() -> list[Kernel]:
    """Return every kernel of the library; without one those that have to be built."""
    if DRY_RUN:
        return [Kernel(BF16, 64, 64)]
    pairs = ((64, 64), (128, 128)) if cuda_library.BUILD is None else cuda_library.BUILD.head_dims
    return [Kernel(dtype, *pair) for dtype in cuda_library.DTYPES for pair in pairs]


every_kernel = pytest.mark.parametrize("kernel", built_kernels(), ids=str)


def case_on_device(shape: Shape, dtype: torch.dtype = BF16, **options: object) -> Case:
    return make_case(shape, dtype=dtype, **options).to(DEVICE)


def poison_memory() -> None:
    """Leave NaN in the memory that the next tensors are likely to get."""
    sizes = [1 << bits for bits in range(9, 16 if DRY_RUN else 26)]
    held = [torch.full((size,), torch.nan, device=DEVICE) for size in sizes for _ in range(3)]
    del held
