"""Memory grows with the row, not with its square."""

import subprocess
import sys

import pytest

resource = pytest.importorskip("resource")

SEQ = 65_536
PROGRAM = f"""
import resource, sys
import torch
from onepass_trl.attention import tree_attention

def normal():
    return torch.randn(1, {SEQ}, 4, 64).transpose(1, 2)

# Conversations of 1,024 tokens, each a trunk of 512 and two branches of 256.
visible_end = torch.arange({SEQ}, dtype=torch.int32)
start = visible_end // 1024 * 1024
ends = torch.tensor([1024, 1024, 768, 1024]).repeat_interleave(256)
visible_end = start + ends.repeat({SEQ} // 1024)
q, k, v = (normal().requires_grad_() for _ in range(3))
out = tree_attention(q, k, v, visible_end.int()[None])
torch.autograd.grad(out, (q, k, v), normal())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak if sys.platform == "darwin" else peak * 1024)
"""


def test_65536_tokens_forward_and_backward_stay_below_one_gib():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 1 << 30
