"""Runs the kernels of fla and mamba-ssm in Triton's interpreter: `make test-fla`. Elsewhere nothing
is collected, as Triton then can't compile kernels in the same process any more.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter  # noqa: F401, I001 (before fla is imported)
    from . import mamba  # noqa: F401 (before models of transformers are)
else:
    collect_ignore_glob = ["*.py"]
