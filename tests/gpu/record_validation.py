"""Adds the kernels that have passed all their tests to onepass_trl/attention/validated.json.

    make test-gpu
    python tests/gpu/record_validation.py build/test_gpu.json

An entry is [compute capability, dtype, [d_qk, d_v]]; `impl="auto"` takes the CUDA kernel for
those. Kernels of which a test failed, was skipped or left out are not recorded, and where a test
failed an entry of an earlier run is taken back. Entries hold for the sources that the file names:
when these change, the file starts over.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VALIDATED = ROOT / "onepass_trl" / "attention" / "validated.json"
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
from cuda_build import source_digest  # noqa: E402


def merge(validated: dict[str, Any], results: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the contents of validated.json after a run of the tests.

    Args:
        validated: what it was.
        results: of the tests, as `conftest.py` writes them.
        source: digest of the sources.
    """
    if results["capability"] is None:
        raise SystemExit(f"{results['device']}: nothing has run on a GPU")
    if results["source"] != source:
        raise SystemExit(
            "the library that was tested is not of these sources: run `make cuda`, `make test-gpu`"
        )
    entries = list(validated["kernels"]) if validated["source"] == source else []
    for kernel in results["kernels"]:
        entry = [results["capability"], kernel["dtype"], kernel["head_dims"]]
        passed = kernel["passed"] == kernel["tests"] > 0
        if passed and entry not in entries:
            entries.append(entry)
        if kernel["failed"] and entry in entries:
            entries.remove(entry)
    return {"source": source, "kernels": sorted(entries)}


def main() -> None:
    """Merge the files of results given as arguments."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    validated = json.loads(VALIDATED.read_text())
    for path in sys.argv[1:]:
        validated = merge(validated, json.loads(Path(path).read_text()), source_digest())
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in validated["kernels"])
    VALIDATED.write_text(
        f'{{"source": {json.dumps(validated["source"])}, "kernels": [\n{lines}\n]}}\n'
    )
    print(f"{len(validated['kernels'])} kernels validated")


if __name__ == "__main__":
    main()
