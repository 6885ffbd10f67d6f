"""Memory grows with the row, not with its square."""

import subprocess
import sys
from pathlib import Path

import pytest

SEQ = 65_536
# The peak of the process itself. `ru_maxrss` isn't: a process starts with that of its parent.
STATUS = Path("/proc/self/status")
PROGRAM = f"""
import torch
from onepass_trl.attention import tree_attention

def peak():
    lines = open("{STATUS}").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def normal():
    return torch.randn(1, {SEQ}, 4, 64).transpose(1, 2)

before = peak()
# Conversations of 1,024 tokens, each a trunk of 512 and two branches of 256.
visible_end = torch.arange({SEQ}, dtype=torch.int32)
start = visible_end // 1024 * 1024
ends = torch.tensor([1024, 1024, 768, 1024]).repeat_interleave(256)
visible_end = start + ends.repeat({SEQ} // 1024)
q, k, v = (normal().requires_grad_() for _ in range(3))
out = tree_attention(q, k, v, visible_end.int()[None])
torch.autograd.grad(out, (q, k, v), normal())
print(peak() - before)
"""
TENSOR = SEQ * 4 * 64 * 4 // 1024  # KiB; q, k, v, out and their gradients are eight


@pytest.mark.skipif(not STATUS.exists(), reason="the peak is read from /proc")
def test_65536_tokens_forward_and_backward_take_little_more_than_their_tensors():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 9 * TENSOR
