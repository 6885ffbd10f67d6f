import shutil
import subprocess

import pytest
import torch

from onepass_trl.attention.implementations import cpu
from onepass_trl.attention.library_files import check_whole, load


def test_whole_files_are_whole():
    check_whole(cpu.PATH)


@pytest.mark.parametrize("share", [0, 0.00001, 0.01, 0.3, 0.7, 0.97, 0.99999])
def test_a_part_of_a_library_is_an_error(tmp_path, share):
    """Where the loader of the system ends the process by SIGBUS."""
    whole = cpu.PATH.read_bytes()
    path = tmp_path / "_cpu.so"
    path.write_bytes(whole[: int(len(whole) * share)])
    error = load(path)
    assert isinstance(error, OSError)
    assert f"the file has only {int(len(whole) * share)}" in str(error)


def test_a_library_of_another_torch_is_an_error(tmp_path):
    (tmp_path / "a.c").write_text(
        "extern int of_newer_torch(void); int f(void) { return of_newer_torch(); }"
    )
    library = tmp_path / "a.so"
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "a.c", "-o", library], check=True)
    check_whole(library)
    assert "of_newer_torch" in str(load(library))


def test_what_is_no_library_is_an_error(tmp_path):
    text = tmp_path / "text.so"
    text.write_text("what a proxy sends instead of a file" * 9)
    assert isinstance(load(text), OSError)
    assert isinstance(load(tmp_path / "nothing.so"), OSError)
    assert isinstance(load(tmp_path), OSError)


def test_bytes_after_the_end_do_not_matter(tmp_path):
    """As in a wheel whose tools have moved parts of the file."""
    path = shutil.copy(cpu.PATH, tmp_path / "_cpu.so")
    with open(path, "ab") as file:
        file.write(b"\0" * 1000)
    check_whole(path)
    assert torch.ops.onepass.cpu_build()
