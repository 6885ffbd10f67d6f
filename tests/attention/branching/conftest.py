from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from onepass_trl.attention.branching import fla_rule, packages


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """A function that installs a package of the given files in place of any other of its name."""
    installed = []

    def forget() -> None:
        for function in (fla_rule.installed_fla, fla_rule.usable_backend, packages._warn_of):
            function.cache_clear()

    def install(package: str, **files: str) -> None:
        (tmp_path / package).mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / package / f"{name}.py").write_text(text)
        for module in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        installed.append(package)
        forget()

    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield install
    for module in [name for name in sys.modules if name.split(".")[0] in installed]:
        del sys.modules[module]
    forget()
