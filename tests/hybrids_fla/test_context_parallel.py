"""Rows that two processes share, by the kernels of fla and mamba-ssm."""

from __future__ import annotations

import subprocess
import sys

WORKER = "tests.hybrids_fla.context_parallel_worker"


def test_pieces_of_rows_compute_what_whole_rows_do(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", WORKER, str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
