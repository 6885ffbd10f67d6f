"""Builds `onepass_trl/_cpu.so`, and `onepass_trl/_cuda.so` if asked for.

Neither knows Python, and of torch they use the stable ABI: one wheel serves every Python and every
torch since 2.11. Everything else is in pyproject.toml; `csrc/cuda/cuda_build.py` says when CUDA is
built.
"""

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

sys.path.insert(0, str(Path(__file__).parent / "csrc" / "cuda"))
import cuda_build


class BuildBoth(BuildExtension.with_options(no_python_abi_suffix=True)):
    """Builds both libraries into the source tree or the wheel."""

    def run(self):
        """Build the library for CPUs, then the CUDA library."""
        options = cuda_build.options_of(dict(os.environ))
        super().run()
        if options is not None:
            library = Path(self.get_ext_fullpath("onepass_trl._cpu")).with_name("_cuda.so")
            cuda_build.build(options, Path("build/cuda"), library)


class WheelForEveryPython(bdist_wheel):
    """Makes a wheel with the tag of the platform alone."""

    def get_tag(self):
        """Return the tags of Python, its ABI and the platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "onepass_trl._cpu",
            sorted(glob("csrc/cpu/*.cpp")),
            include_dirs=include_paths(),
            define_macros=[("TORCH_TARGET_VERSION", cuda_build.TORCH_TARGET_VERSION)],
            extra_compile_args=["-O3", "-g0", "-Wall", "-fvisibility=hidden"],
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildBoth, "bdist_wheel": WheelForEveryPython},
)
