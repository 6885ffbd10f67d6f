"""The dense reference as an implementation: any device and floating dtype, small inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from onepass_trl.attention.implementations.base import Call, Implementation, ImplStatus
from onepass_trl.attention.reference import dense_tree_attention


def _status() -> ImplStatus:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return ImplStatus("dense", True, devices, "eager reference, O(seq^2) memory")


def _check(call: Call) -> None:
    pass


def _run(call: Call) -> tuple[Tensor, Tensor]:
    return dense_tree_attention(**call._asdict())


DENSE = Implementation("dense", _status, _check, _run)
