"""Attention that rounds where the CUDA kernels do, and mistakes to plant in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.reference import visibility_mask


class _Fused(torch.autograd.Function):
    """Float32, but P and dS are rounded to the dtype before their products."""

    @staticmethod
    def forward(ctx: Any, q, k, v, sinks, call: Call):
        probabilities, slope, lse = _probabilities(q, k, sinks, call)
        out = _rounded(probabilities, q.dtype) @ _of_heads(v, q)
        ctx.save_for_backward(q, k, v, sinks, out.to(q.dtype), lse, probabilities, slope)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None):
        q, k, v, sinks, out, lse, probabilities, slope = ctx.saved_tensors
        group = q.shape[1] // k.shape[1]
        delta = (dout.float() * out.float()).sum(-1)
        if dlse is not None:
            delta = delta - dlse
        dscores = probabilities * (dout.float() @ _of_heads(v, q).mT - delta[..., None]) * slope
        rounded = _rounded(dscores, q.dtype)
        dq = ctx.call.scale * rounded @ _of_heads(k, q)
        dk = ctx.call.scale * (rounded.mT @ q.float()).unflatten(1, (-1, group)).sum(2)
        of_values = _rounded(probabilities, q.dtype).mT @ dout.float()
        dv = of_values.unflatten(1, (-1, group)).sum(2)
        dsinks = None
        if sinks is not None:
            dsinks = -(torch.exp(sinks[:, None] - lse) * delta).sum((0, 2))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None


def run_fused(call: Call) -> tuple[Tensor, Tensor]:
    """Return what a fused kernel of the dtype returns, differentiable; O(seq^2) memory."""
    return _Fused.apply(call.q, call.k, call.v, call.sinks, call)


def _of_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


def _probabilities(q, k, sinks, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    scores, slope = call.scale * (q.float() @ _of_heads(k, q).mT), torch.ones(())
    if call.softcap is not None:
        capped = torch.tanh(scores / call.softcap)
        scores, slope = call.softcap * capped, 1 - capped.square()
    visible = visibility_mask(call.visible_end, call.positions, call.window)[:, None]
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
    return torch.exp(scores - lse[..., None]), slope, lse
