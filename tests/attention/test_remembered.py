"""What was computed from tensors is computed again when they change."""

import gc
import weakref

import pytest
import torch

from onepass_trl.attention.remembered import Remembered


@pytest.fixture
def remembered() -> Remembered:
    return Remembered()


def test_it_is_made_once_for_each_key(remembered):
    x, other = torch.zeros(3), torch.ones(3)
    first = remembered.get(x, (other,), "a", lambda: x + other)
    assert remembered.get(x, (other,), "a", lambda: pytest.fail("made twice")) is first
    assert remembered.get(x, (other,), "b", lambda: x - other) is not first


def test_a_change_of_any_tensor_is_seen(remembered):
    x, other = torch.zeros(3), torch.ones(3)

    def total() -> float:
        return float(remembered.get(x, (other,), None, lambda: x + other).sum())

    assert total() == 3
    x += 1
    assert total() == 6
    other.mul_(2)
    assert total() == 9
    x.data = torch.full((3,), 5.0)
    assert total() == 21
    other = torch.zeros(3)
    assert total() == 15


def test_inference_tensors_count_no_changes(remembered):
    with torch.inference_mode():
        x = torch.zeros(3)
        assert remembered.get(x, (), None, lambda: x + 1).sum() == 3
        x += 1
        assert remembered.get(x, (), None, lambda: x + 1).sum() == 6


def test_it_goes_with_its_tensor(remembered):
    x = torch.zeros(3)
    made = weakref.ref(remembered.get(x, (), None, lambda: torch.ones(2)))
    assert made() is not None
    del x
    gc.collect()
    assert made() is None
