"""Runs fla's own kernels in Triton's interpreter: `make test-fla`. Elsewhere nothing is collected,
as Triton then can't compile kernels in the same process any more.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter  # noqa: F401 (before fla is imported)
else:
    collect_ignore_glob = ["*.py"]
