"""Loading of the compiled libraries: an error, never a crash."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

_ELF_HEADER = struct.Struct("<4sBB10xHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_CLASS_64, _LITTLE_ENDIAN, _LOADED = 2, 1, 1


def load(path: Path) -> OSError | None:
    """Load a library of ops into torch; return why it can't be loaded, None if it is."""
    try:
        check_whole(path)
        torch.ops.load_library(path)
    except OSError as error:
        # torch says which library, and its cause what is wrong with it.
        return error.__cause__ if isinstance(error.__cause__, OSError) else error
    return None


def check_whole(path: Path) -> None:
    """Raise OSError unless all bytes of an ELF file of 64 bits are there.

    The loader of the system maps what the file's header announces. Where a download or a build was
    cut short, reading that ends the process by SIGBUS. What is no such file, the loader refuses.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_ELF_HEADER.size)
        if len(start) < _ELF_HEADER.size:
            raise OSError(f"the file has only {size} bytes")
        magic, word, order, *fields = _ELF_HEADER.unpack(start)
        if (magic, word, order) != (b"\x7fELF", _CLASS_64, _LITTLE_ENDIAN):
            return
        programs, sections, num_programs, section_size, num_sections = (
            fields[i] for i in (4, 5, 9, 10, 11)
        )
        file.seek(programs)
        headers = file.read(num_programs * _PROGRAM_HEADER.size)
    # The section headers come last in the file.
    ends = [programs + num_programs * _PROGRAM_HEADER.size, sections + num_sections * section_size]
    if len(headers) == num_programs * _PROGRAM_HEADER.size:
        for kind, _, offset, _, _, bytes_in_file, _, _ in _PROGRAM_HEADER.iter_unpack(headers):
            ends += [offset + bytes_in_file] if kind == _LOADED else []
    if size < max(ends):
        raise OSError(f"the file has only {size} of {max(ends)} bytes")
