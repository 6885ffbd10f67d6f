"""Builds the CUDA library and checks the result; `make check-cuda` calls it. No GPU is needed.

- No kernel keeps registers in memory ("spills"), according to `ptxas -v`, and those that move
  registers from one warpgroup to another start with as many as they distribute.
- The products of a warpgroup run asynchronously: ptxas has not serialized them.
- Exponentials of the Hopper forward kernels overlap with products: ptxas has not moved the wait for
  the products before them.
- Every family of kernels has the instructions that it is written for (`FAMILIES`).
- The only undefined symbols of torch are those of its stable ABI.

Unless ONEPASS_CUDA_ARCHS asks for others, the kernels for 8.0, 9.0a and 12.0 are checked.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cuda_build

DEFAULT_ARCHS = "80;90a;120"


class Family(NamedTuple):
    """Kernels, and patterns of prefixes of the instructions that they must contain."""

    kernels: str
    archs: str
    instructions: tuple[str, ...]
    of_all_builds: bool = True
    """False if only some head sizes have such a kernel."""


# How blocks wait for each other: they read until a number is there, and set it after their writes.
IN_ORDER = (r"LD\S*\.STRONG\.GPU", r"MEMBAR\.\S*GPU")
# Hopper kernels in which one warpgroup copies and the others compute.
SPECIALIZED = r"sm90::(forward|dq|dk_dv|dq_dk_dv)_kernel"
FAMILIES = (
    Family(
        r"sm80::(forward|dq|dk_dv|dq_dk_dv)_kernel",
        r"sm_\d+a?",
        (r"HMMA\.16816", "LDSM", "LDGSTS"),
    ),
    Family(
        r"sm80::dq_dk_dv_kernel",
        r"sm_\d+a?",
        (r"RED\S*\.ADD\.F32", *IN_ORDER),
        of_all_builds=False,
    ),
    Family(
        SPECIALIZED,
        r"sm_90a",
        ("HGMMA", "UTMALDG", "WARPGROUP", r"USETMAXREG\.TRY_ALLOC", r"USETMAXREG\.DEALLOC"),
    ),
    Family(
        r"sm90::dq_dk_dv_kernel",
        r"sm_90a",
        (r"HGMMA.*\.tnspA\.tnspB", r"UBLKRED\S*\.ADD\.F32", r"STSM", *IN_ORDER),
        of_all_builds=False,
    ),
)
# Per thread at the start of such a kernel (kRegisters of sm90/config.h): with fewer, consumers
# would wait forever for the registers that they take.
HOPPER_REGISTERS = 168

# The C functions of torch's stable ABI, and versioned symbols of the system's libraries.
STABLE_SYMBOLS = re.compile(r"(aoti_torch_|torch_)\w+|\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")


class Kernel(NamedTuple):
    """What ptxas says about one kernel for one architecture."""

    name: str
    arch: str
    registers: int
    spilled_bytes: int


def read_kernels(folder: Path) -> list[Kernel]:
    """Return the kernels of the objects that build.ninja in a folder makes."""
    text = "".join(path.with_name(path.name + ".log").read_text() for path in _objects(folder))
    pattern = (
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes "
        r"spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, text, flags=re.DOTALL)
    return [
        Kernel(name, arch, int(registers), int(stores) + int(loads))
        for name, (_, arch, stores, loads, registers) in zip(
            _demangle([mangled for mangled, *_ in found]), found, strict=True
        )
    ]


def spill_errors(kernels: list[Kernel]) -> Iterator[str]:
    """Yield a line for each kernel that spills."""
    for kernel in kernels:
        if kernel.spilled_bytes:
            yield f"{kernel.name} for {kernel.arch} spills {kernel.spilled_bytes} bytes"


def register_errors(kernels: list[Kernel]) -> Iterator[str]:
    """Yield a line for each Hopper kernel that starts with an unexpected number of registers."""
    for kernel in kernels:
        if re.match(SPECIALIZED, kernel.name) and kernel.registers != HOPPER_REGISTERS:
            yield f"{kernel.name} has {kernel.registers} registers, expected {HOPPER_REGISTERS}"


def serialized_products(folder: Path) -> Iterator[str]:
    """Yield a line for each kernel whose warpgroup products ptxas has serialized."""
    for path in _objects(folder):
        text = path.with_name(path.name + ".log").read_text()
        yield from re.findall(r".*wgmma.mma_async instructions are serialized.*", text)


def instruction_errors(folder: Path) -> Iterator[str]:
    """Yield a line for each instruction that a kernel lacks, and for families without a kernel."""
    code = _machine_code(folder)
    for family in FAMILIES:
        for arch in sorted({arch for _, arch in code}):
            if not re.match(family.archs, arch):
                continue
            kernels = [name for name, of in code if of == arch and re.match(family.kernels, name)]
            if not kernels and family.of_all_builds:
                yield f"no kernel for {arch} matches {family.kernels!r}"
            for name in kernels:
                for instruction in family.instructions:
                    if not re.search(rf"\s{instruction}", code[name, arch]):
                        yield f"{name} for {arch} has no {instruction}"


def overlap_errors(folder: Path) -> Iterator[str]:
    """Yield a line for each Hopper forward kernel that waits for O += P V before its softmax."""
    for (name, _), body in _machine_code(folder).items():
        match = re.match(r"sm90::forward_kernel<.*, (\d+)>", name)
        if match is None:
            continue
        # After the wait for the scores; each thread has half as many as a tile has keys
        # (ForwardConfig::kKeys), of which each takes an exponential for the softmax and one for the
        # softcap. A tile without products to overlap with has a wait of its own before them.
        in_loop = body.partition("DEPBAR.LE gsb0, 0x1")[2].partition("HGMMA")[0]
        meanwhile = in_loop.rpartition("DEPBAR.LE gsb0, 0x0")[0]
        keys = 128 if int(match[1]) <= 128 else 64
        found = meanwhile.count("MUFU.EX2")
        if found < keys:
            yield f"{name} overlaps {found} exponentials with products, expected {keys}"


def symbol_errors(library: Path) -> Iterator[str]:
    """Yield a line for each undefined symbol that is not of a stable interface."""
    output = _run("nm", "-D", "--undefined-only", str(library))
    for kind, symbol in re.findall(r"^\s*(\w) (\S+)$", output, flags=re.MULTILINE):
        if kind == "U" and not STABLE_SYMBOLS.fullmatch(symbol):
            yield f"{library.name} needs {_demangle([symbol])[0]}, which torch may change"


def _objects(folder: Path) -> list[Path]:
    text = (folder / "build.ninja").read_text()
    return [Path(path) for path in re.findall(r"^build (\S+): cuda ", text, flags=re.MULTILINE)]


def _demangle(symbols: list[str]) -> list[str]:
    """Return the names without result type, arguments and our namespace."""
    lines = _run("c++filt", *symbols).splitlines() if symbols else []
    noise = r"^void |\(anonymous namespace\)::|onepass::cuda::|\([^()]*\)$"
    return [re.sub(noise, "", line) for line in lines]


@functools.cache  # two checks read it
def _machine_code(folder: Path) -> dict[tuple[str, str], str]:
    """Return the disassembled kernels of the objects, by name and architecture."""
    code = {}
    for path in _objects(folder):
        for of_arch in _disassemble(path).split("code for ")[1:]:
            arch, _, functions = of_arch.partition("\n")
            for function in functions.split("Function : ")[1:]:
                mangled, _, body = function.partition("\n")
                code[mangled.strip(), arch.strip()] = body
    names = _demangle([mangled for mangled, _ in code])
    return {(name, arch): body for name, ((_, arch), body) in zip(names, code.items(), strict=True)}


def _disassemble(path: Path) -> str:
    # From the toolkit, or from the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec is not None else None
    folders = [str(folder) for root in roots or [] for folder in Path(root).glob("cu*/bin")]
    search = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    tool = shutil.which("cuobjdump", path=search)
    if tool is None:
        raise SystemExit(
            "there is no cuobjdump to disassemble with: pip install nvidia-cuda-cuobjdump "
            "nvidia-cuda-nvdisasm"
        )
    return _run(tool, "-sass", str(path), PATH=search)


def _run(*command: str, **environment: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
    ).stdout


def main() -> None:
    """Build in build/check-cuda, print what ptxas says, and fail with everything that is wrong."""
    options = cuda_build.options_of({"ONEPASS_CUDA_ARCHS": DEFAULT_ARCHS, **os.environ})
    if options is None:
        print("check-cuda: skipped, there is no nvcc (or ONEPASS_CUDA=0)")
        return
    folder = cuda_build.HERE.parents[1] / "build" / "check-cuda"
    library = folder / "_cuda.so"
    cuda_build.build(options, folder, library)
    kernels = read_kernels(folder)
    for kernel in sorted(kernels):
        print(
            f"{kernel.arch}  {kernel.registers:3} registers  {kernel.spilled_bytes:3} bytes "
            f"spilled  {kernel.name}"
        )
    errors = [*spill_errors(kernels), *register_errors(kernels), *serialized_products(folder)]
    errors += [*instruction_errors(folder), *overlap_errors(folder), *symbol_errors(library)]
    if errors:
        raise SystemExit("\n".join(["check-cuda:", *errors]))
    print(f"check-cuda: {len(kernels)} kernels, no problem found")


if __name__ == "__main__":
    main()
