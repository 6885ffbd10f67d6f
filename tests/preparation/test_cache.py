"""What the caches of `datasets` must not outlive."""

from pathlib import Path

import onepass_trl
from onepass_trl.preparation.cache import code_digest


def test_the_digest_is_of_the_whole_package(monkeypatch):
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or path.name.encode())
    code_digest.__wrapped__()
    package = Path(onepass_trl.__file__).parent
    assert sorted(read) == sorted(package.rglob("*.py"))
