"""The compiled copy of `coverage` against the definition."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from onepass_trl.visibility import coverage, cut_into_tiles

from .strategies import tilings


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("tiles") / "tiles.so"
    source = Path(__file__).with_name("tiles.cpp")
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"]
    subprocess.run([*command, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@given(tiling=tilings())
def test_the_compiled_plan_covers_the_same_tiles(compiled, tiling):
    row, positions, window, begins, sizes = tiling
    queries, keys = (cut_into_tiles(row, positions, size, begins) for size in sizes.values())
    visited, full = coverage(queries, keys, window)
    covered = np.zeros(visited.shape, dtype=np.int64)
    compiled.onepass_cover(
        *(
            None if x is None else x.ctypes.data_as(ctypes.c_void_p)
            for x in (begins, row, positions)
        ),
        ctypes.c_int64(row.size),
        *(ctypes.c_int64(size) for size in sizes.values()),
        ctypes.c_int32(window or 0),
        covered.ctypes.data_as(ctypes.c_void_p),
    )
    assert np.array_equal(covered, visited.astype(int) + full)
