"""Builds the CUDA library with nvcc and ninja; `setup.py` and `make cuda` call it.

Besides the presence of nvcc (never that of a GPU), these variables decide what is built:

- ``ONEPASS_CUDA``: 1 to require the library, 0 to leave it out; unset: where nvcc and CuTe are;
- ``ONEPASS_CUDA_ARCHS``: compute capabilities, as in "80+PTX;86;89;90a". 90a gets the Hopper
  kernels too, for which the headers of CuTe are needed (``CUTLASS_PATH``, or the PyPI package
  nvidia-cutlass). With +PTX, drivers compile the kernels for any later device that has none;
- ``ONEPASS_HEAD_DIMS``: head sizes, as in "64;128;192/128" (d_qk/d_v where they differ).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
DEFAULT_ARCHS = "80;86;89;90a"
DEFAULT_HEAD_DIMS = "64;96;128;192;256;192/128"
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest torch that the library serves
# The libraries with torch's symbols: a library that does not name them does not load, although
# torch has loaded them before. Linked against empty stand-ins, since a CPU build of torch lacks
# one.
TORCH_LIBRARIES = ("torch_cpu", "torch_cuda")
ELEMENTS = {"bf16": "Bf16", "fp16": "Fp16"}
HOPPER = "90a"
# Head sizes that have Hopper kernels; the portable kernels are used for the others.
HOPPER_HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))


class Options(NamedTuple):
    """What to build."""

    nvcc: str
    archs: tuple[str, ...]
    head_dims: tuple[tuple[int, int], ...]
    cute: str | None
    """Folder of the headers of CuTe, None if no Hopper kernel is built."""


def options_of(environment: dict[str, str]) -> Options | None:
    """Return the options from the environment, None for no CUDA library.

    Raises SystemExit, naming the variable, if one cannot be understood or nvcc is missing.
    """
    wanted = environment.get("ONEPASS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"ONEPASS_CUDA is {wanted!r}, expected 0 or 1")
    nvcc = _find_nvcc(environment)
    if wanted == "0" or (not wanted and nvcc is None):
        return None
    if nvcc is None:
        raise SystemExit(
            "ONEPASS_CUDA=1 and there is no nvcc: put the CUDA toolkit's bin on the PATH or set "
            "CUDA_HOME"
        )
    archs = tuple(_entries(environment, "ONEPASS_CUDA_ARCHS", DEFAULT_ARCHS, r"[0-9]+(a|\+PTX)?"))
    cute = _find_cute(environment) if HOPPER in archs else None
    if HOPPER in archs and cute is None:
        message = (
            "the Hopper kernels need the headers of CuTe: `pip install --no-deps nvidia-cutlass`, "
            f"set CUTLASS_PATH, or leave {HOPPER} out of ONEPASS_CUDA_ARCHS"
        )
        if wanted:
            raise SystemExit(message)
        print(f"leaving the CUDA library out: {message}")
        return None
    dims = _entries(environment, "ONEPASS_HEAD_DIMS", DEFAULT_HEAD_DIMS, r"[0-9]+(/[0-9]+)?")
    pairs = [(int(entry.split("/")[0]), int(entry.split("/")[-1])) for entry in dims]
    for d_qk, d_v in pairs:
        if d_qk % 32 or d_v % 32 or not 32 <= d_v <= d_qk <= 256:
            raise SystemExit(
                f"ONEPASS_HEAD_DIMS has {d_qk}/{d_v}, expected multiples of 32 from 32 to 256, and "
                "d_v at most d_qk"
            )
    return Options(nvcc, archs, tuple(pairs), cute)


def build(options: Options, folder: Path, library: Path) -> None:
    """Write `library` and, next to it, a JSON of its contents; objects are in `folder`.

    The library is moved into place whole. The JSON is the last to come: a library without one, from
    a build that was interrupted, isn't used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    sources = [HERE / "api.cpp", HERE / "kernels.cu", HERE / "plan.cu"]
    sources += _write_instantiations(options, folder)
    _write(folder / "nothing.cpp", "")
    linked, source = folder / library.name, source_digest()
    _write(folder / "build.ninja", _ninja(options, folder, sources, linked))
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
    facts = {
        "archs": list(options.archs),
        "head_dims": [list(pair) for pair in options.head_dims],
        "nvcc": _nvcc_version(options.nvcc),
        "source": source,
    }
    library.with_suffix(".json").unlink(missing_ok=True)
    partial = library.with_suffix(".partial.so")
    shutil.copy(linked, partial)
    partial.replace(library)
    library.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


def source_digest() -> str:
    """Return a digest of what kernels and binding are compiled from, whatever the options."""
    digest = hashlib.sha256()
    kernels = [path for path in HERE.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    for file in sorted([*HERE.parent.glob("*.h"), *kernels]):
        digest.update(f"{file.relative_to(HERE.parent)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _find_nvcc(environment: dict[str, str]) -> str | None:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    inside = None if home is None else shutil.which("nvcc", path=str(Path(home) / "bin"))
    return inside or shutil.which("nvcc", path=environment.get("PATH"))


def _find_cute(environment: dict[str, str]) -> str | None:
    home = environment.get("CUTLASS_PATH")
    candidates = [] if not home else [Path(home, "include")]
    package = importlib.util.find_spec("cutlass_library")
    if package is not None and package.submodule_search_locations:
        candidates.append(Path(package.submodule_search_locations[0], "source", "include"))
    for folder in candidates:
        if (folder / "cute" / "arch" / "mma_sm90_gmma.hpp").exists():
            return str(folder)
    return None


def _entries(environment: dict[str, str], name: str, default: str, pattern: str) -> list[str]:
    entries = [entry for entry in re.split(r"[;,\s]+", environment.get(name) or default) if entry]
    for entry in entries:
        if not re.fullmatch(pattern, entry):
            raise SystemExit(f"{name} has {entry!r}, expected entries as in {default!r}")
    return list(dict.fromkeys(entries))


def passes_of(
    head_dims: Sequence[tuple[int, int]], *, hopper: bool
) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Return the head sizes that are instantiated of each (family, pass)."""
    of_hopper = [pair for pair in head_dims if hopper and pair in HOPPER_HEAD_DIMS]
    return {
        ("sm80", "forward"): list(head_dims),
        ("sm80", "backward"): list(head_dims),
        ("sm90", "forward"): of_hopper,
        ("sm90", "backward"): of_hopper,
    }


def _write_instantiations(options: Options, folder: Path) -> list[Path]:
    """Write one translation unit per kernel, to compile in parallel; return their paths."""
    passes = passes_of(options.head_dims, hopper=HOPPER in options.archs)
    _write(folder / "head_dims.h", head_dims_header(passes))
    return [
        _write_instantiation(folder, family, direction, pair, name)
        for (family, direction), pairs in passes.items()
        for pair in pairs
        for name in ELEMENTS
    ]


def head_dims_header(passes: dict[tuple[str, str], list[tuple[int, int]]]) -> str:
    """Return the header that tells kernels.cu what is instantiated."""
    return "".join(
        f"#define ONEPASS_{family.upper()}_{direction.upper()} "
        f"{' '.join(f'HEAD_DIMS({d_qk}, {d_v})' for d_qk, d_v in pairs)}\n"
        for (family, direction), pairs in passes.items()
    )


def _write_instantiation(
    folder: Path, family: str, direction: str, pair: tuple[int, int], name: str
) -> Path:
    path = folder / f"{family}_{direction}_{pair[0]}_{pair[1]}_{name}.cu"
    params = "Params" if direction == "forward" else "BackwardParams"
    _write(
        path,
        f'#include "{family}/{direction}.cuh"\n\n'
        f"template void onepass::cuda::{family}::launch_{direction}<\n"
        f"    onepass::cuda::{ELEMENTS[name]}, {pair[0]}, {pair[1]}>(\n"
        f"    const onepass::cuda::{params}&, onepass::cuda::Stream);\n",
    )
    return path


def _write(path: Path, text: str) -> None:
    """Write a file only if it changes, so that ninja rebuilds nothing."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _ninja(options: Options, folder: Path, sources: list[Path], library: Path) -> str:
    from torch.utils.cpp_extension import include_paths

    all_archs, hopper = _gencode(options.archs), _gencode([HOPPER])
    folders = [str(folder.absolute()), str(HERE.absolute()), *filter(None, [options.cute])]
    includes = " ".join(f"-I{path}" for path in folders)
    torch_includes = " ".join(f"-I{path}" for path in include_paths())
    libraries = " ".join(f"-l{name}" for name in TORCH_LIBRARIES)
    common = "-std=c++17 -O3 -Xcompiler -fPIC -MD -MF $out.d"
    lines = [
        f"nvcc = {options.nvcc}",
        "rule cuda",
        f"  command = $nvcc {common} $archs -lineinfo -Xptxas -v {includes} -c $in -o $out "
        "2> $out.log || (cat $out.log >&2; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule binding",
        f"  command = $nvcc {common} -DUSE_CUDA -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} "
        f"{includes} {torch_includes} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule stand_in",
        f"  command = $nvcc -shared -cudart none {folder.absolute()}/nothing.cpp -o $out "
        "-Xlinker -soname=$name",
        "  description = stand-in for $name",
        "rule link",
        f"  command = $nvcc -shared -cudart static $in -o $out -L{folder.absolute()} "
        f"-Xlinker --no-as-needed {libraries}",
        "  description = link $out",
    ]
    stand_ins = []
    for name in TORCH_LIBRARIES:
        stand_ins.append(str(folder.absolute() / f"lib{name}.so"))
        lines += [f"build {stand_ins[-1]}: stand_in", f"  name = lib{name}.so"]
    objects = []
    for source in sources:
        rule = "binding" if source.suffix == ".cpp" else "cuda"
        built = folder.absolute() / f"{source.stem}.o"
        lines.append(f"build {built}: {rule} {source.absolute()}")
        lines.append(f"  archs = {hopper if source.name.startswith('sm90') else all_archs}")
        objects.append(str(built))
    lines += [f"build {library.absolute()}: link {' '.join(objects)} | {' '.join(stand_ins)}", ""]
    return "\n".join(lines)


def _gencode(archs: Sequence[str]) -> str:
    codes = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        codes += [(number, f"sm_{number}")]
        codes += [(number, f"compute_{number}")] if arch.endswith("+PTX") else []
    return " ".join(f"-gencode=arch=compute_{number},code={code}" for number, code in codes)


def _nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release [0-9.]+, V([0-9.]+)", output)
    return match[1] if match else "unknown"


def main() -> None:
    """Build into the package's folder: what `make cuda` runs."""
    options = options_of(dict(os.environ, ONEPASS_CUDA="1"))
    assert options is not None
    root = HERE.parents[1]
    build(options, root / "build" / "cuda", root / "onepass_trl" / "_cuda.so")
    print(f"built onepass_trl/_cuda.so for {', '.join('sm_' + arch for arch in options.archs)}")


if __name__ == "__main__":
    main()
