"""Weights that are checked in this process; test_distributed.py checks those of several."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from onepass_trl.training.finite_weights import check_weights


@pytest.fixture
def divided(monkeypatch):
    """A model that is divided as by ZeRO-3, and its whole weights.

    Stands in for DeepSpeed, with which test_distributed.py runs where it is installed.
    """
    model = nn.Linear(2, 3)
    whole = {}
    for number, weight in enumerate(model.parameters()):
        whole[weight] = weight.data
        weight.data = torch.empty(0)
        weight.ds_id = number

    class GatheredParameters:
        def __init__(self, weights):
            self.weights = weights

        def __enter__(self):
            for weight in self.weights:
                weight.data = whole[weight]

        def __exit__(self, *error):
            for weight in self.weights:
                weight.data = torch.empty(0)

    # As there, an attribute: no module can be imported by the name deepspeed.zero.
    deepspeed = ModuleType("deepspeed")
    deepspeed.zero = SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    return model, whole


def test_divided_weights_are_put_together(divided):
    model, whole = divided
    check_weights(model, 3)
    whole[model.weight][2, 1] = torch.inf
    with pytest.raises(FloatingPointError, match="the weights aren't finite after step 3"):
        check_weights(model, 3)
    assert not model.weight.numel()


def test_weights_that_are_not_trained_may_be_anything():
    model = nn.Linear(2, 3)
    model.weight.requires_grad_(False).fill_(torch.nan)
    check_weights(model, 1)
