"""Builds the compiled parts: `onepass_trl._C` for CPUs, and `onepass_trl/_cuda.so` if asked for.

Everything else is in pyproject.toml; `csrc/cuda/cuda_build.py` says when CUDA is built.
"""

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

sys.path.insert(0, str(Path(__file__).parent / "csrc" / "cuda"))
import cuda_build

# at::parallel_for uses OpenMP from a header: without this flag the kernels would be serial.
# Apple's compiler has none.
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildBoth(BuildExtension):
    """Builds the CUDA library next to the extension, in the source tree or in the wheel."""

    def run(self):
        """Build the extension, then the CUDA library."""
        options = cuda_build.options_of(dict(os.environ))
        super().run()
        if options is not None:
            library = Path(self.get_ext_fullpath("onepass_trl._C")).with_name("_cuda.so")
            cuda_build.build(options, Path("build/cuda"), library)


setup(
    ext_modules=[
        CppExtension(
            "onepass_trl._C",
            ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            extra_compile_args=["-O3", "-g0", "-Wall", *openmp],
            extra_link_args=openmp,
        )
    ],
    cmdclass={"build_ext": BuildBoth},
)
