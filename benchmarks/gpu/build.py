"""The C++ extension in place: there, taken prebuilt, or built for the GPU at hand."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from benchmarks.common.hardware import ROOT
from benchmarks.gpu.process import child, last_line
from benchmarks.gpu.steps import FAILED, OK, SKIPPED, Run, Step

PREBUILT = "SETFORMER_KERNELS_PREBUILT"  # a built extension, or a folder with one
PACKAGE = ROOT / "setformer_kernels"
ASKS = (
    "from setformer_kernels.backends import _extension as e; import sys; print(e.REASON); "
    "sys.exit(1 if e.MODULE is None else 0 if hasattr(e.MODULE, 'cuda_attention') else 3)"
)
WITHOUT_CUDA = 3  # exit status of ASKS


def toolkit(run: Run) -> bool:
    """Whether nvcc is there."""
    home = os.environ.get("CUDA_HOME", "")
    return bool(run.system.which("nvcc") or (home and Path(home, "bin", "nvcc").exists()))


def mtime(path: Path) -> float:
    """When a file was written."""
    return path.stat().st_mtime


def is_new(package: Path = PACKAGE) -> bool:
    """Whether there is an extension newer than its sources."""
    root = package.parent
    found = list(package.glob("_C*.so"))
    sources = [root / "setup.py", *(path for path in (root / "csrc").rglob("*") if path.is_file())]
    return bool(found) and min(map(mtime, found)) >= max(map(mtime, sources))


def trouble(run: Run, cuda: bool) -> str:
    """Why the extension cannot be used, with its CUDA kernels where they are wanted; empty where it can."""
    status, output = child(run.system, [sys.executable, "-c", ASKS], 60, run.logs / "extension.log")
    if status == 0 or (status == WITHOUT_CUDA and not cuda):
        return ""
    return "it was built without the CUDA kernels" if status == WITHOUT_CUDA else last_line(output)


def cuda_variables() -> dict[str, str]:
    """What makes the build compile the CUDA kernels, for this machine's GPU alone unless the caller says otherwise."""
    import torch

    variables = {"SETFORMER_KERNELS_CUDA": "1"}
    if torch.cuda.is_available() and "SETFORMER_KERNELS_CUDA_ARCHS" not in os.environ:
        major, minor = torch.cuda.get_device_capability()
        variables["SETFORMER_KERNELS_CUDA_ARCHS"] = f"{major}{minor}"
    return variables


def take(given: Path, package: Path = PACKAGE) -> str:
    """Puts a built extension into the package; why not, or nothing."""
    names = [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    files = [given] if given.is_file() else [given / name for name in names if (given / name).is_file()]
    if not files:
        return f"{given} is no built extension and holds none named {names[0]}"
    if files[0].name not in names:
        return f"{files[0].name} is for another interpreter: this one loads {names[0]}"
    target = package / files[0].name
    if not (target.exists() and target.samefile(files[0])):
        target.unlink(missing_ok=True)  # a process may have the old one mapped: it keeps its file
        shutil.copy(files[0], target)
    return ""


def step(run: Run, seconds: float) -> Step:
    """The extension, with the CUDA kernels where nvcc is; the battery goes on without it."""
    given = run.prebuilt or (Path(os.environ[PREBUILT]) if os.environ.get(PREBUILT) else None)
    if given is not None:
        why = take(given) or trouble(run, cuda=True)
        return Step("build", FAILED, f"{given}: {why}") if why else Step("build", OK, f"taken prebuilt: {given}")
    cuda = toolkit(run)
    what = "the extension with the CUDA kernels" if cuda else "the extension, without CUDA kernels: no nvcc"
    if is_new() and not trouble(run, cuda):
        return Step("build", OK, f"there: {what}")
    lacking = [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]
    lacking += [] if any(map(run.system.which, ("c++", "g++", "clang++"))) else ["a C++ compiler"]
    if lacking:
        return Step("build", SKIPPED, f"without the C++ extension: no {', no '.join(lacking)}")
    return _built(run, seconds, cuda, what)


def _built(run: Run, seconds: float, cuda: bool, what: str) -> Step:
    # Kept: a build that was stopped goes on where it was.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", str(ROOT / "build" / "gpu")]
    variables = {"SETFORMER_KERNELS_CPU_BUILD": "native"}  # the GPU waits for what is not for it
    status, output = child(
        run.system, command, seconds, run.logs / "build.log", **variables, **(cuda_variables() if cuda else {})
    )
    why = f"stopped after {seconds:.0f} s" if status is None else last_line(output) if status else trouble(run, cuda)
    if why:
        return Step("build", FAILED, f"without the C++ extension: {why}", details=(output[-3000:],))
    return Step("build", OK, f"built in place: {what}")
