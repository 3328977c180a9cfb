"""Builds the optional C++ extension; everything else about the package is in pyproject.toml.

The extension needs neither torch nor its headers.  One build holds the kernels for every instruction set of the
architecture and chooses at run time.  What is built stays in build/, and only what changed, or includes what changed,
is compiled again, by the records that ninja would keep: the compiler's of what a source includes, and the arguments'
beside each object.  A pool of threads runs the compilers; ninja would do no more with these few files, whose longest
ends the build.  Without a compiler the package still installs, on the reference: the build says
what was missing, and leaves it beside the package for `python -m setformer_kernels info`.

SETFORMER_KERNELS_CPU_BUILD=all|native: the kernels of every instruction set, or of this machine's widest alone, for a
short wait after an edit.
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
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

MISSING = "_C.missing.txt"  # beside the extension that could not be built: why, for `info`
INSTALL_A_COMPILER = "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: cxx-compiler)"
X86 = platform.machine().lower() in ("x86_64", "amd64")
PLAIN = ["python/bindings.cpp", "cpu/isa/dispatch.cpp", "cpu/base/scratch.cpp", "cpu/probe_threads.cpp"]
# Compiled once for each instruction set; those that take longest first.
UNITS = [
    "sinkhorn",
    "linearised",
    "packed",
    "attention_backward",
    "attention",
    "causal_backward",
    "masked_backward",
    "masked",
    "causal",
    "step",
    "features",
    "table",
]
BF16_UNITS = ["bf16"]  # compiled where a processor has products of bfloat16
WIDE = ["-mprefer-vector-width=512"]  # gcc and clang prefer 256 bits on some targets


class Isa(NamedTuple):
    """An instruction set: the flags that allow it, and the macros by which a compiler says that it may be used.

    One with units of its own has the rest from the instruction set that it is `beside`.
    """

    flags: list[str]
    macros: list[str]
    units: list[str] = UNITS
    beside: str = ""


AVX512 = ["f", "bw", "dq", "vl"]
AVX512_FLAGS = [*(f"-mavx512{part}" for part in AVX512), "-mfma", *WIDE]
AVX512_MACROS = [f"__AVX512{part.upper()}__" for part in AVX512]
BF16_FLAGS, BF16_MACROS = ["-mavx512bf16"], ["__AVX512BF16__"]  # gcc 10, clang 9
AMX_FLAGS = [*BF16_FLAGS, "-mamx-tile", "-mamx-bf16"]  # gcc 11, clang 12
AMX_MACROS = [*BF16_MACROS, "__AMX_TILE__", "__AMX_BF16__"]
ISAS = {  # the widest first
    "amx": Isa([*AVX512_FLAGS, *AMX_FLAGS], [*AVX512_MACROS, *AMX_MACROS], BF16_UNITS, "avx512"),
    "avx512bf16": Isa([*AVX512_FLAGS, *BF16_FLAGS], [*AVX512_MACROS, *BF16_MACROS], BF16_UNITS, "avx512"),
    "avx512": Isa(AVX512_FLAGS, AVX512_MACROS),
    "avx2": Isa(["-mavx2", "-mfma"], ["__AVX2__", "__FMA__"]),
    "generic": Isa([], []),
}
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["--threads", "0"]  # architectures side by side, as many as there are processors
SPLIT = "--split-compile=0"  # the kernels of a file side by side, too; CUDA 12.1 and newer
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


def nvcc_flags() -> list[str]:
    """What nvcc is called with for every source."""
    knows = subprocess.run([nvcc(), SPLIT, "--dryrun", "none.cu"], capture_output=True, timeout=60).returncode == 0
    return [*NVCC_FLAGS, *([SPLIT] if knows else []), *cuda_architectures()]


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


def isas(compiler: list[str]) -> list[str]:
    """The instruction sets to build for, the widest first."""
    choice = os.environ.get("SETFORMER_KERNELS_CPU_BUILD", "all")
    if choice not in ("all", "native"):
        sys.exit(f"SETFORMER_KERNELS_CPU_BUILD must be all or native, got {choice!r}")
    if not X86:
        return ["generic"]
    if choice == "all":
        can = {"amx": sys.platform == "linux" and compiles(compiler, AMX_FLAGS)}
        can["avx512bf16"] = compiles(compiler, BF16_FLAGS)
        return [name for name in ISAS if can.get(name, True)]
    command = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    defined = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    widest = next(name for name, isa in ISAS.items() if set(isa.macros) <= set(defined))
    return [name for name in (widest, ISAS[widest].beside) if name]


def up_to_date(built: Path, arguments: str) -> bool:
    """Whether an object is newer than all that it was made of, as the compiler wrote it down, by the same arguments."""
    made_of, made_by = built.with_suffix(".d"), built.with_suffix(".flags")
    if not (built.exists() and made_of.exists() and made_by.exists() and made_by.read_text("utf-8") == arguments):
        return False
    names = shlex.split(made_of.read_text("utf-8").partition(":")[2].replace("\\\n", " "))
    return all(Path(name).exists() and Path(name).stat().st_mtime <= built.stat().st_mtime for name in names)


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
    """Compiles what is not up to date, several files at a time; says why where it cannot."""

    def build_extension(self, ext: Extension) -> None:
        notes = [Path(self.get_ext_fullpath(ext.name)).with_name(MISSING)]
        if getattr(self, "editable_mode", False):  # built elsewhere, then copied to the sources if it could be
            notes.append(Path("setformer_kernels", MISSING))
            self.build_temp = str(Path("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}"))
        for note in notes:
            note.unlink(missing_ok=True)
        try:
            self.compile_extension(ext)
        except (BaseError, CCompilerError):
            for note in notes:
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

    def compile_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise CompileError("pybind11 is missing") from error
        self.binding = [pybind11.get_include()]
        if self.compiler.compiler_type != "unix":
            ext.include_dirs = [*ext.include_dirs, *self.binding]
            return super().build_extension(ext)
        self.set_unix_flags(ext)
        plain = list(ext.define_macros)
        if cuda_wanted():
            self.add_cuda(ext)
            try:
                return self.link(ext, self.objects_with_cuda(ext))
            except CompileError:
                if os.environ.get("SETFORMER_KERNELS_CUDA") == "1":
                    sys.exit("SETFORMER_KERNELS_CUDA=1, but the CUDA kernels do not compile")
                print("the CUDA kernels do not compile: building without them", file=sys.stderr)
                ext.define_macros, ext.libraries = plain, []
        self.link(ext, self.objects(ext))

    def objects(self, ext: Extension) -> list[str]:
        """The compiled sources: each kernel once for every instruction set."""
        chosen = isas(list(self.compiler.compiler_cxx))
        every = [*UNITS, *BF16_UNITS]
        units = [(f"cpu/isa/{unit}.cpp", isa) for unit in every for isa in chosen if unit in ISAS[isa].units]
        plain = [*PLAIN, *(["python/cuda_bindings.cpp"] if ("SFK_CUDA", "1") in ext.define_macros else [])]
        jobs = [(plain[0], ""), *units, *((source, "") for source in plain[1:])]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            return list(pool.map(lambda job: self.compile_one(ext, *job, chosen), jobs))

    def compile_one(self, ext: Extension, source: str, isa: str, chosen: list[str]) -> str:
        """The object of a source, for an instruction set or for all; compiled where it is not up to date."""
        macros, flags = list(ext.define_macros), [*ext.extra_compile_args, "-MMD"]
        if isa:
            macros, flags = [*macros, ("SFK_ISA", isa)], [*flags, *ISAS[isa].flags]
        if source.endswith("dispatch.cpp"):
            macros += [(f"SFK_{name.upper()}", "1") for name in chosen]
        folder = Path(self.build_temp, isa or "plain")
        built = folder / Path("csrc", source).with_suffix(".o")
        # Of the bindings alone: pip has a folder of its own for pybind11 each time.
        folders = [*ext.include_dirs, *(self.binding if source.startswith("python/") else [])]
        arguments = repr((self.compiler.compiler_cxx, flags, macros, folders))
        if self.force or not up_to_date(built, arguments):
            made_by = built.with_suffix(".flags")
            made_by.unlink(missing_ok=True)
            options = {"macros": macros, "include_dirs": folders, "extra_postargs": flags}
            self.compiler.compile([f"csrc/{source}"], output_dir=str(folder), **options)
            made_by.write_text(arguments, encoding="utf-8")
        return str(built)

    def objects_with_cuda(self, ext: Extension) -> list[str]:
        """The compiled sources, those for the GPU too: a file each, beside the others."""
        sources, flags = sorted(Path("csrc", "cuda").glob("*.cu")), nvcc_flags()
        with ThreadPoolExecutor(max_workers=len(sources)) as pool:
            made = [pool.submit(self.cuda_object, path, flags) for path in sources]
            return [*self.objects(ext), *(one.result() for one in made)]

    def cuda_object(self, path: Path, flags: list[str]) -> str:
        """What nvcc makes of a source; compiled where it is not up to date."""
        built = Path(self.build_temp, "cuda", path.stem).with_suffix(".o")
        built.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc(), *flags, "-MMD", "-MF", str(built.with_suffix(".d")), "-c", str(path), "-o", str(built)]
        arguments = repr((cuda_toolkit(), command))
        if self.force or not up_to_date(built, arguments):
            made_by = built.with_suffix(".flags")
            made_by.unlink(missing_ok=True)
            print(shlex.join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                raise CompileError(f"nvcc cannot compile {path}")
            made_by.write_text(arguments, encoding="utf-8")
        return str(built)

    def link(self, ext: Extension, objects: list[str]) -> None:
        """The extension, where an object is newer."""
        ext.sources, ext.extra_objects, ext.depends = [], objects, objects
        super().build_extension(ext)

    def add_cuda(self, ext: Extension) -> None:
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


def extension() -> Extension:
    """The extension; optional, so that an installation never fails for want of it."""
    return Extension(
        "setformer_kernels._C",
        sources=[f"csrc/{name}" for name in [*PLAIN, *(f"cpu/isa/{unit}.cpp" for unit in [*UNITS, *BF16_UNITS])]],
        include_dirs=["csrc"],
        depends=[str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu")]
        + ["csrc/python/cuda_bindings.cpp"],
        language="c++",
        optional=True,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
