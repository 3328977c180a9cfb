"""The CUDA kernels built for the CPU: their own source on the shim of csrc/cuda/testing."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.common.hardware import ROOT

SOURCES, BUILD = ROOT / "csrc", ROOT / "build" / "shim"


def cuda_shim(sources: Path = SOURCES, build: Path = BUILD) -> ModuleType:
    """The module, built where something has changed."""
    folder = os.path.relpath(build, sources)
    command = ["make", "--silent", "-C", str(sources), "cuda-shim", f"PYTHON={sys.executable}", f"SHIM={folder}"]
    build.parent.mkdir(parents=True, exist_ok=True)
    with build.with_suffix(".lock").open("w") as lock:  # one build for all processes of a parallel run
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(command, check=True, timeout=600)
    spec = importlib.util.spec_from_file_location("cuda_shim", build / "cuda_shim.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(shim: ModuleType) -> None:
    """The cuda backend runs on CPU tensors from here on."""
    from setformer_kernels.backends import cuda

    cuda._C, cuda.ABSENT, cuda._DEVICE = shim, "", "cpu"
