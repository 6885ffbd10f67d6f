"""Builds the CUDA library with nvcc and ninja; `setup.py` and `make cuda` call it.

What decides, besides the presence of nvcc (never that of a GPU):

- ``ONEPASS_CUDA``: 1 to require the library, 0 to leave it out; unset: where nvcc is;
- ``ONEPASS_CUDA_ARCHS``: compute capabilities, as in "80;86;89;90";
- ``ONEPASS_HEAD_DIMS``: head sizes, as in "64;128;192/128" (d_qk/d_v where they differ).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
DEFAULT_ARCHS = "80;86;89;90"
DEFAULT_HEAD_DIMS = "64;96;128;192;256;192/128"
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest torch that the library serves
# Where the symbols of torch are: a library that does not name them does not load, although torch
# has loaded them before. Linked against empty stand-ins, since a CPU build of torch lacks one.
TORCH_LIBRARIES = ("torch_cpu", "torch_cuda")
ELEMENTS = {"bf16": "Bf16", "fp16": "Fp16"}


class Options(NamedTuple):
    """What to build."""

    nvcc: str
    archs: tuple[str, ...]
    head_dims: tuple[tuple[int, int], ...]


def options_of(environment: dict[str, str]) -> Options | None:
    """Return what the environment asks for, None for no CUDA library.

    Raises SystemExit with the variable's name if one cannot be understood or nvcc is missing.
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
    archs = tuple(_entries(environment, "ONEPASS_CUDA_ARCHS", DEFAULT_ARCHS, r"[0-9]+a?"))
    dims = _entries(environment, "ONEPASS_HEAD_DIMS", DEFAULT_HEAD_DIMS, r"[0-9]+(/[0-9]+)?")
    pairs = [(int(entry.split("/")[0]), int(entry.split("/")[-1])) for entry in dims]
    for d_qk, d_v in pairs:
        if d_qk % 32 or d_v % 32 or not 32 <= d_v <= d_qk <= 256:
            raise SystemExit(
                f"ONEPASS_HEAD_DIMS has {d_qk}/{d_v}, expected multiples of 32 from 32 to 256, and "
                "d_v at most d_qk"
            )
    return Options(nvcc, archs, tuple(pairs))


def build(options: Options, folder: Path, library: Path) -> None:
    """Write `library` and, beside it, a JSON of what it holds; objects lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    sources = [HERE / "api.cpp", HERE / "kernels.cu", HERE / "plan.cu"]
    sources += _write_instantiations(options, folder)
    _write(folder / "nothing.cpp", "")
    _write(folder / "build.ninja", _ninja(options, folder, sources, library))
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
    facts = {
        "archs": list(options.archs),
        "head_dims": [list(pair) for pair in options.head_dims],
        "nvcc": _nvcc_version(options.nvcc),
    }
    library.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


def _find_nvcc(environment: dict[str, str]) -> str | None:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    inside = None if home is None else shutil.which("nvcc", path=str(Path(home) / "bin"))
    return inside or shutil.which("nvcc", path=environment.get("PATH"))


def _entries(environment: dict[str, str], name: str, default: str, pattern: str) -> list[str]:
    entries = [entry for entry in re.split(r"[;,\s]+", environment.get(name) or default) if entry]
    for entry in entries:
        if not re.fullmatch(pattern, entry):
            raise SystemExit(f"{name} has {entry!r}, expected entries as in {default!r}")
    return list(dict.fromkeys(entries))


def _write_instantiations(options: Options, folder: Path) -> list[Path]:
    """Write one translation unit per kernel, which compile in parallel; return their paths."""
    head_dims = " ".join(f"HEAD_DIMS({d_qk}, {d_v})" for d_qk, d_v in options.head_dims)
    _write(folder / "head_dims.h", f"#define ONEPASS_HEAD_DIMS {head_dims}\n")
    paths = []
    for d_qk, d_v in options.head_dims:
        for name, element in ELEMENTS.items():
            for direction, params in (("forward", "Params"), ("backward", "BackwardParams")):
                path = folder / f"sm80_{direction}_{d_qk}_{d_v}_{name}.cu"
                _write(
                    path,
                    f'#include "sm80/{direction}.cuh"\n\n'
                    f"template void onepass::cuda::sm80::launch_{direction}<\n"
                    f"    onepass::cuda::{element}, {d_qk}, {d_v}>(\n"
                    f"    const onepass::cuda::{params}&, onepass::cuda::Stream);\n",
                )
                paths.append(path)
    return paths


def _write(path: Path, text: str) -> None:
    """Write a file only if it changes, so that ninja builds nothing anew."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _ninja(options: Options, folder: Path, sources: list[Path], library: Path) -> str:
    from torch.utils.cpp_extension import include_paths

    gencode = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in options.archs)
    includes = " ".join(f"-I{path}" for path in (folder.absolute(), HERE.absolute()))
    torch_includes = " ".join(f"-I{path}" for path in include_paths())
    libraries = " ".join(f"-l{name}" for name in TORCH_LIBRARIES)
    common = "-std=c++17 -O3 -Xcompiler -fPIC -MD -MF $out.d"
    lines = [
        f"nvcc = {options.nvcc}",
        "rule cuda",
        f"  command = $nvcc {common} {gencode} -lineinfo -Xptxas -v {includes} -c $in -o $out "
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
        objects.append(str(built))
    lines += [f"build {library.absolute()}: link {' '.join(objects)} | {' '.join(stand_ins)}", ""]
    return "\n".join(lines)


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
