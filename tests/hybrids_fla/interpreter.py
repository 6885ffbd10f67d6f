"""Lets Triton's interpreter run the kernels of fla and mamba-ssm on CPU tensors. Import it before
these.

Only float32: products of bfloat16 are wrong in the interpreter.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import autotuner, interpreter

assert knobs.runtime.interpret, "run with TRITON_INTERPRET=1"


def _take_the_smallest_blocks() -> None:
    """Timing configurations would ask a GPU driver for a clock; and tests have small tensors."""

    def size(_: Any, *__: Any, config: Any, **___: Any) -> list[float]:
        blocks = [x for name, x in config.kwargs.items() if name.startswith("BLOCK_SIZE")]
        return [float(math.prod(blocks))] * 3

    autotuner.Autotuner._bench = size


def _need_no_gpu() -> None:
    """mamba-ssm chooses the GPU of its tensors, and asks how many processors it has."""
    torch.cuda.device = lambda _: nullcontext()
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=1)


def _count_in_tensors() -> None:
    """A compiled kernel's loop variable is a tensor; in the interpreter it is a Python integer."""

    def tensor_range(*bounds: Any) -> Iterator[tl.tensor]:
        for i in range(*(b if isinstance(b, int) else int(b.handle.data.item()) for b in bounds)):
            data = np.array([i], dtype=np.int32)
            yield tl.tensor(interpreter.TensorHandle(data, tl.int32), tl.int32)

    class Ranges(ast.NodeTransformer):
        def visit_For(self, node: ast.For) -> ast.For:
            self.generic_visit(node)
            match node.iter:
                case ast.Call(func=ast.Name(id="range") as function):
                    function.id = "_tensor_range"
            return node

    transform = interpreter.FunctionRewriter._transform_ast

    def transform_with_ranges(self: Any, source: str) -> ast.AST:
        self.fn.__globals__["_tensor_range"] = tensor_range
        return ast.fix_missing_locations(Ranges().visit(transform(self, source)))

    interpreter.FunctionRewriter._transform_ast = transform_with_ranges


def _make_masks_boolean() -> None:
    """``mask & (a if c else b)`` may be an integer in the interpreter."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def boolean(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(np.bool_), tl.int1)

    builder.create_masked_load = lambda self, pointers, mask, *args: load(
        self, pointers, boolean(mask), *args
    )
    builder.create_masked_store = lambda self, pointers, value, mask, *args: store(
        self, pointers, value, boolean(mask), *args
    )


_take_the_smallest_blocks()
_need_no_gpu()
_count_in_tensors()
_make_masks_boolean()
