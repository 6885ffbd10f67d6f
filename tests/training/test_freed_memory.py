"""Memory that stays in the process from step to step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from onepass_trl.training import freed_memory

# The page faults of making and freeing 4 times 40 MB, the first and the second time.
COUNT_FAULTS = """
import resource, runpy

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = [b"x" * 40_000_000 for _ in range(4)]
    del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory = runpy.run_path(PATH)["keep_freed_memory"]
print(KEEP and keep_freed_memory(), faults(), faults())
"""


def count_faults(*, keep: bool, **environment: str) -> tuple[bool, int, int]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    code = COUNT_FAULTS.replace("KEEP", str(keep)).replace("PATH", repr(freed_memory.__file__))
    command = [sys.executable, "-c", code]
    shown = subprocess.run(
        command, check=True, capture_output=True, text=True, env=env | environment
    ).stdout.split()
    return shown[0] == "True", int(shown[1]), int(shown[2])


@pytest.mark.skipif(sys.platform != "linux", reason="an option of glibc")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    _, first, second = count_faults(keep=False)
    assert second > 0.5 * first > 10  # one a page, of which there are few if they are huge
    kept, first, second = count_faults(keep=True)
    if not kept:
        pytest.skip("this C library has no such option")
    assert second < 0.1 * first


def test_an_allocator_that_the_user_set_up_is_left_alone() -> None:
    assert not count_faults(keep=True, MALLOC_TRIM_THRESHOLD_="1048576")[0]
    assert not count_faults(keep=True, GLIBC_TUNABLES="glibc.malloc.trim_threshold=1048576")[0]
