"""Builds the optional C++ extension; everything else about the package is in pyproject.toml.

The extension needs neither torch nor its headers.  One build holds the kernels for every instruction set of the
architecture and chooses at run time.  Without a compiler the package still installs, on the reference: the build says
what was missing, and leaves it beside the package for `python -m setformer_kernels info`.

SETFORMER_KERNELS_CUDA=auto|0|1: CUDA kernels where nvcc and a GPU are found, never, or always (failing without nvcc).
SETFORMER_KERNELS_CUDA_ARCHS: the compute capabilities they are compiled for, "80;90;100;120" by default.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

MISSING = "_C.missing.txt"  # beside the extension that could not be built: why, for `info`
INSTALL_A_COMPILER = "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: cxx-compiler)"
X86 = platform.machine().lower() in ("x86_64", "amd64")
COMMON = ["bindings.cpp", "cpu/dispatch.cpp", "cpu/scratch.cpp", "cpu/probe_threads.cpp", "cpu/kernels_generic.cpp"]
WIDE = ["-mprefer-vector-width=512"]  # gcc and clang prefer 256 bits on some targets
# Source file -> flags of its instruction set; only that file may use it.
ISA_FLAGS = {
    "cpu/kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "cpu/kernels_avx512.cpp": [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", *WIDE],
}
CUDA = ["cuda/bindings.cpp", *(f"cuda/{path.name}" for path in sorted(Path("csrc", "cuda").glob("*.cu")))]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["--threads", "0"]  # architectures side by side, as many as there are processors
PTX = "90"  # what GPUs that are newer than the list compile for themselves


def nvcc() -> str:
    """The compiler of CUDA_HOME, or the one on PATH; empty where there is none."""
    folder = os.environ.get("CUDA_HOME", "")
    return (shutil.which("nvcc", path=str(Path(folder, "bin"))) if folder else None) or shutil.which("nvcc") or ""


def cuda_toolkit() -> str:
    """The folder that nvcc belongs to; empty where there is none."""
    if not nvcc():
        return ""
    told = subprocess.run([nvcc(), "--dryrun", "none.cu"], capture_output=True, text=True, timeout=60).stderr
    tops = [line.partition("TOP=")[2].strip() for line in told.splitlines() if "TOP=" in line]
    return str(Path(tops[0]).resolve()) if tops else ""


def cuda_wanted() -> bool:
    """Whether to build the CUDA kernels; ends the build where they are required and cannot be."""
    choice = os.environ.get("SETFORMER_KERNELS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"SETFORMER_KERNELS_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "1" and not cuda_toolkit():
        sys.exit("SETFORMER_KERNELS_CUDA=1 needs nvcc, on PATH or in CUDA_HOME")
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return choice == "1" or (choice == "auto" and has_gpu and bool(cuda_toolkit()))


def cuda_architectures() -> list[str]:
    """nvcc's flags: machine code for every architecture of the list, and PTX."""
    wanted = os.environ.get("SETFORMER_KERNELS_CUDA_ARCHS", "80;90;100;120").replace(",", ";").split(";")
    machine = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    return [*machine, f"-gencode=arch=compute_{PTX},code=compute_{PTX}"]


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
    """Compiles each source with its own flags, several at a time; says why where it cannot."""

    def build_extension(self, ext: Extension) -> None:
        note = Path(self.get_ext_fullpath(ext.name)).with_name(MISSING)
        note.unlink(missing_ok=True)
        try:
            self.add_pybind11(ext)
            self.compile_extension(ext)
        except (BaseError, CCompilerError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(self.trouble() + "\n", encoding="utf-8")
            lines = ("", f"setformer_kernels is built WITHOUT its C++ kernels: {self.trouble()}.")
            print(*lines, "It works all the same, on its reference, which is several times slower on CPUs.", "",
                  sep="\n", file=sys.stderr, flush=True)  # fmt: skip
            raise

    def trouble(self) -> str:
        """Why there is no extension, and what to do about it."""
        if importlib.util.find_spec("pybind11") is None:
            return "pybind11 was missing when it was installed: pip install pybind11, then install the package again"
        compiler = getattr(self.compiler, "compiler_cxx", None) or [""]
        again = f"{INSTALL_A_COMPILER}, then install the package again"
        if not compiles(list(compiler), []):
            return f"no C++ compiler was found when it was installed ({compiler[0]!r} does not run): {again}"
        return f"the C++ compiler {compiler[0]!r} could not compile it; pip install -v shows its messages"

    def add_pybind11(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise CompileError("pybind11 is missing") from error
        ext.include_dirs = [*ext.include_dirs, pybind11.get_include()]

    def compile_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            return super().build_extension(ext)
        self.set_unix_flags(ext)
        if not cuda_wanted():
            return super().build_extension(ext)
        plain = list(ext.sources), list(ext.define_macros)
        self.add_cuda(ext)
        try:
            super().build_extension(ext)
        except CompileError:
            if os.environ.get("SETFORMER_KERNELS_CUDA") == "1":
                sys.exit("SETFORMER_KERNELS_CUDA=1, but the CUDA kernels do not compile")
            print("the CUDA kernels do not compile: building without them", file=sys.stderr)
            ext.sources, ext.define_macros, ext.libraries = *plain, []
            super().build_extension(ext)

    def add_cuda(self, ext: Extension) -> None:
        self.force = True  # the dates of the sources do not tell whether an extension that is there has CUDA
        if ".cu" not in self.compiler.src_extensions:
            self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        ext.sources = [*ext.sources, *(f"csrc/{name}" for name in CUDA)]
        ext.define_macros = [*ext.define_macros, ("SFK_CUDA", "1")]
        folders = [Path(cuda_toolkit(), name) for name in ("lib64", "lib")]
        ext.library_dirs = [str(path) for path in folders if path.exists()]
        ext.libraries = ["cudart_static", "dl", "rt", "pthread"]

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
            if sys.platform == "linux":  # a released wheel brings the OpenMP runtime there (.ci/repair.py)
                ext.extra_link_args.append("-Wl,-rpath,$ORIGIN/lib")
        ext.extra_compile_args = base
        plain_compile, plain_batch = self.compiler._compile, self.compiler.compile

        def compile_one(obj, src, ext_, cc_args, extra, pp_opts):  # type: ignore[no-untyped-def]
            if str(src).endswith(".cu"):
                command = [nvcc(), *NVCC_FLAGS, *cuda_architectures(), "-c", str(src), "-o", str(obj)]
                print(shlex.join(command))
                if subprocess.run(command).returncode != 0:
                    raise CompileError(f"nvcc cannot compile {src}")
                return
            flags = next((f for name, f in ISA_FLAGS.items() if str(src).endswith(name)), [])
            plain_compile(obj, src, ext_, cc_args, [*extra, *flags], pp_opts)

        def compile_all(sources, **options):  # type: ignore[no-untyped-def]
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
                jobs = [pool.submit(plain_batch, [source], **options) for source in sources]
                return [job.result()[0] for job in jobs]

        self.compiler._compile, self.compiler.compile = compile_one, compile_all


def extension() -> Extension:
    """The extension; optional, so that an installation never fails for want of it."""
    return Extension(
        "setformer_kernels._C",
        sources=[f"csrc/{name}" for name in [*COMMON, *(ISA_FLAGS if X86 else [])]],
        include_dirs=["csrc"],
        define_macros=[("SFK_X86", "1")] if X86 else [],
        depends=[str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".inc", ".cuh", ".cu")]
        + ["csrc/cuda/bindings.cpp"],
        language="c++",
        optional=True,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
