"""Builds the compiled extension `onepass_trl._C`; everything else is in pyproject.toml."""

import sys
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# at::parallel_for runs on OpenMP, from a header: without this flag the kernels would be serial.
# Apple's compiler has none.
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]

setup(
    ext_modules=[
        CppExtension(
            "onepass_trl._C",
            ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            extra_compile_args=["-O3", "-g0", "-Wall", *openmp],
            extra_link_args=openmp,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
