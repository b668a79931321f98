"""Builds ``fastenc._C`` (CPU kernels and host code) against torch's stable ABI.

The Python sources of ``triton_kernels/`` are installed as ``fastenc.triton_kernels`` and under no
other name: ``triton_kernels`` alone is an upstream package.
"""

from __future__ import annotations

import glob
import os

import pybind11
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = os.path.dirname(os.path.abspath(__file__))
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11


def cpu_extension() -> CppExtension:
    sources = sorted(glob.glob("csrc/cpu/*.cpp") + glob.glob("csrc/host/*.cpp"))
    return CppExtension(
        name="fastenc._C",
        sources=sources,
        include_dirs=[ROOT, pybind11.get_include()],
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++20",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-Wall",
            STABLE_ABI,
        ],
        extra_link_args=["-Wl,--no-as-needed"] if os.name == "posix" else [],
    )


setup(
    packages=[*find_packages(include=["fastenc", "fastenc.*"]), "fastenc.triton_kernels"],
    package_dir={"fastenc.triton_kernels": "triton_kernels"},
    package_data={"fastenc": ["py.typed"]},
    ext_modules=[cpu_extension()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
