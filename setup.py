"""Builds the optional C++ extension; everything else about the package is in pyproject.toml.

The extension needs neither torch nor its headers.  One build holds the kernels for every instruction set of the
architecture and chooses at run time.  Without a compiler the package still installs.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
COMMON = ["bindings.cpp", "cpu/dispatch.cpp", "cpu/scratch.cpp", "cpu/probe_threads.cpp", "cpu/kernels_generic.cpp"]
WIDE = ["-mprefer-vector-width=512"]  # gcc and clang prefer 256 bits on some targets
# Source file -> flags of its instruction set; only that file may use it.
ISA_FLAGS = {
    "cpu/kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "cpu/kernels_avx512.cpp": [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", *WIDE],
}


def compiles(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler accepts the flags and can link with them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, str(source), "-o", str(Path(folder, "probe"))]
        try:
            return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
        except (OSError, subprocess.SubprocessError):
            return False


class Build(build_ext):
    """Compiles each source with its own flags, several at a time."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "unix":
            self.set_unix_flags(ext)
        super().build_extension(ext)

    def set_unix_flags(self, ext: Extension) -> None:
        compiler = list(self.compiler.compiler_cxx)
        base = [
            "-std=c++17",
            "-O3",
            "-g0",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            "-Wall",
        ]
        # The last two: gcc 12 warns about its own AVX-512 header.
        base += [
            flag
            for flag in ("-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
            if compiles(compiler, [flag])
        ]
        if compiles(compiler, ["-fopenmp"]):
            base.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        ext.extra_compile_args = base
        plain_compile, plain_batch = self.compiler._compile, self.compiler.compile

        def compile_one(obj, src, ext_, cc_args, extra, pp_opts):  # type: ignore[no-untyped-def]
            flags = next((f for name, f in ISA_FLAGS.items() if str(src).endswith(name)), [])
            plain_compile(obj, src, ext_, cc_args, [*extra, *flags], pp_opts)

        def compile_all(sources, **options):  # type: ignore[no-untyped-def]
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
                jobs = [pool.submit(plain_batch, [source], **options) for source in sources]
                return [job.result()[0] for job in jobs]

        self.compiler._compile, self.compiler.compile = compile_one, compile_all


def extensions() -> list[Extension]:
    """The extension, or none where its one build-time dependency is missing."""
    try:
        import pybind11
    except ImportError:
        print("pybind11 is missing: building without the C++ extension", file=sys.stderr)
        return []
    sources = [f"csrc/{name}" for name in [*COMMON, *(ISA_FLAGS if X86 else [])]]
    return [
        Extension(
            "setformer_kernels._C",
            sources=sources,
            include_dirs=["csrc", pybind11.get_include()],
            define_macros=[("SFK_X86", "1")] if X86 else [],
            depends=[str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".inc")],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
