"""Builds the CPU kernel, if there is a compiler: without one the library installs and computes in PyTorch, slower."""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = "overtone/kernels/cpu.cpp"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
]
VARIANTS: dict[str, list[str]] = {"rows_baseline": []}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64") and "arm64" not in os.environ.get("ARCHFLAGS", "")
if IS_X86:
    VARIANTS["rows_avx2"] = ["-mavx2", "-mfma"]
    VARIANTS["rows_avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


class BuildVariants(build_ext):
    """Compiles the rows once more for each kind of vector instructions; the module chooses among them at run time."""

    def build_extension(self, ext: Extension) -> None:
        """Adds the variants' objects to those of the module."""
        for variant, flags in VARIANTS.items():
            ext.extra_objects += self.compiler.compile(
                [SOURCE],
                output_dir=str(Path(self.build_temp, variant)),
                macros=[("ROWS", variant)],
                extra_postargs=[*FLAGS, *flags, "-Wno-psabi"],
            )
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "overtone.kernels._cpu",
            [SOURCE],
            define_macros=[("OVERTONE_X86", None)] if IS_X86 else [],
            extra_compile_args=FLAGS,
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildVariants},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
