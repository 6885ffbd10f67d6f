"""Adds the kernels that have passed all their tests to onepass_trl/attention/validated.json.

    make test-gpu
    python tests/gpu/record_validation.py build/test_gpu.json

An entry is [compute capability, dtype, [d_qk, d_v]]; `impl="auto"` takes the CUDA kernel for
those. Kernels of which a test failed, was skipped or left out are not recorded, and where a test
failed an entry of an earlier run is taken back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

VALIDATED = Path(__file__).parents[2] / "onepass_trl" / "attention" / "validated.json"


def merge(validated: list[Any], results: dict[str, Any]) -> list[Any]:
    """Return the entries after a run of the tests."""
    if results["capability"] is None:
        raise SystemExit(f"{results['device']}: nothing has run on a GPU")
    entries = list(validated)
    for kernel in results["kernels"]:
        entry = [results["capability"], kernel["dtype"], kernel["head_dims"]]
        passed = kernel["passed"] == kernel["tests"] > 0
        if passed and entry not in entries:
            entries.append(entry)
        if kernel["failed"] and entry in entries:
            entries.remove(entry)
    return sorted(entries)


def main() -> None:
    """Merge the files of results given as arguments."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    entries = json.loads(VALIDATED.read_text())
    for path in sys.argv[1:]:
        entries = merge(entries, json.loads(Path(path).read_text()))
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    VALIDATED.write_text(f"[\n{lines}\n]\n" if entries else "[]\n")
    print(f"{len(entries)} kernels validated")


if __name__ == "__main__":
    main()
