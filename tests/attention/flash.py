"""The variable-length kernels of torch for CPU tensors, through the dispatcher and its schemas."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def flash_attention_on_cpu() -> Iterator[list[dict]]:
    """Register eager kernels for CPU tensors; yields the options of each call of forward."""
    calls: list[dict] = []

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, _debug, **options):
        assert dropout == 0
        calls.append(dict(max_q=max_q, max_k=max_k, is_causal=is_causal, **options))
        outs, lses = [], []
        for (q0, q1), (k0, k1) in zip(_spans(cu_q, max_q), _spans(cu_k, max_k), strict=True):
            scores = _scores(q[q0:q1], k[k0:k1], is_causal, **options)
            lse = scores.logsumexp(-1)
            outs.append(torch.exp(scores - lse[..., None]) @ _per_head(v[k0:k1], q.shape[1]))
            lses.append(lse)
        out = torch.cat(outs, dim=1).transpose(0, 1).to(q.dtype)
        state = [torch.zeros(2, dtype=torch.uint64), torch.zeros(0)]
        return out.contiguous(), torch.cat(lses, dim=1), *state, torch.zeros(0)

    def backward(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, is_causal, _rng, _, **options
    ):
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        for (q0, q1), (k0, k1) in zip(_spans(cu_q, max_q), _spans(cu_k, max_k), strict=True):
            queries, keys, values = q[q0:q1], k[k0:k1], v[k0:k1]
            probs = torch.exp(_scores(queries, keys, is_causal, **options) - lse[:, q0:q1, None])
            do = dout[q0:q1].transpose(0, 1).to(probs.dtype)
            delta = (do * out[q0:q1].transpose(0, 1)).sum(-1, keepdim=True)
            ds = probs * (do @ _per_head(values, q.shape[1]).mT - delta) * options["scale"]
            dq[q0:q1] = (ds @ _per_head(keys, q.shape[1])).transpose(0, 1)
            of_heads = (ds.mT @ queries.transpose(0, 1).to(ds.dtype), probs.mT @ do)
            for dx, of_head in zip((dk, dv), of_heads, strict=True):
                dx[k0:k1] = of_head.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
        return dq, dk, dv

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def _spans(starts: Tensor, longest: int) -> list[tuple[int, int]]:
    assert starts.dtype == torch.int32
    spans = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
    assert longest == max(end - begin for begin, end in spans)
    return spans


def _per_head(x: Tensor, heads: int) -> Tensor:
    """``(tokens, kv_heads, head_dim)`` as ``(heads, tokens, head_dim)``, in float32 or more."""
    repeated = x.transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)
    return repeated.to(torch.promote_types(x.dtype, torch.float32))


def _scores(
    q: Tensor, k: Tensor, is_causal: bool, *, scale, window_size_left=None, window_size_right=None
) -> Tensor:
    """Masked scores, ``(heads, queries, keys)``: queries and keys are aligned at their ends."""
    query = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    visible = key <= query
    if not is_causal:
        assert window_size_right == 0
        visible = visible & (query - key <= window_size_left)
    heads = q.shape[1]
    scores = scale * _per_head(q, heads) @ _per_head(k, heads).mT
    return scores.masked_fill(~visible, -torch.inf)
