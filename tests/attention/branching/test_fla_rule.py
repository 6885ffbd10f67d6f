"""When trees go through fla, and what is said where they can't. What fla computes of them is tested
with its kernels, in tests/hybrids_fla.
"""

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from onepass_trl.attention.branching import fla_rule
from onepass_trl.attention.branching.delta_rule import delta_rule

TREE = torch.tensor([[4, 4, 3, 4]], dtype=torch.int32)


UNUSABLE = {
    "too old": (dict(__init__="__version__ = '0.5.2'"), "version 0.5.2, expected .*>=0.6,<0.7"),
    "too new": (dict(__init__="__version__ = '0.7.0'"), "version 0.7.0, expected .*>=0.6,<0.7"),
    "half installed": (dict(__init__="import no_such_module"), "ModuleNotFoundError: No module"),
    "broken library": (dict(__init__="raise OSError('lib.so: no such file')"), "OSError: lib.so"),
    "another Triton": (
        dict(__init__="import torch; torch.no_such_name"),
        "AttributeError: .*no_such_name",
    ),
    "no version": (dict(__init__=""), "ImportError: cannot import name '__version__'"),
    "module missing": (
        dict(__init__="__version__ = '0.6.1'", backends="BaseBackend = register = None"),
        "No module named 'fla.ops'",
    ),
}


@pytest.mark.parametrize(("files", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_trees_cannot_go_through_is_said_once_and_not_used(install, caplog, files, reason):
    install("fla", **files)
    called = []

    def rule(query, key, value, g, beta, **options):
        called.append(options)
        return value, value.new_zeros(len(value), 1, 2, 2)

    x = torch.randn(1, 4, 1, 2)
    gates = torch.zeros(1, 4, 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out, _ = delta_rule(rule, "rule")(x, x, x, gates, gates, visible_end=TREE)
    assert torch.equal(out, x)
    assert called
    [record] = caplog.records
    assert "can't compute a tree in one call" in record.message
    assert re.search(reason, record.message), record.message


def test_nothing_is_said_where_there_is_no_fla(caplog):
    if fla_rule.importlib.util.find_spec("fla") is not None:
        pytest.skip("fla is installed")
    assert fla_rule.usable_backend() is None
    assert fla_rule.installed_fla().detail == "not installed"
    assert not caplog.records


def test_keys_for_which_fla_has_no_kernel_are_refused():
    x, gates = torch.zeros(1, 4, 1, 320), torch.zeros(1, 4, 1)
    backend = SimpleNamespace(MAX_KEY_DIM=256)
    with pytest.raises(ValueError, match=r"got keys of 320 numbers .*take at most 256"):
        fla_rule.along_tree_by_fla(backend, "rule", TREE, (x, x, x, gates, gates))
