"""What a number was measured on: machine, versions, commit, and the machine's own limits measured in the same run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "POT", "geomloss", "setformer-kernels", "triton")
SIMD_FLAGS = ("sse2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "asimd")
# Of processes whose memory is measured: what is freed leaves them at once.
CHILD_ENV = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
COPY_BYTES = 2**26  # of one thread's buffer: beyond any last-level cache share


class Unavailable(Exception):
    """Something cannot be measured here; the message says why and goes into the row."""


def _cpuinfo(field: str) -> str:
    """One field of /proc/cpuinfo, empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return match.group(1) if match else ""


def cpu_flags() -> str:
    """The SIMD extensions of this CPU that matter to a kernel, separated by blanks."""
    present = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return " ".join(flag for flag in SIMD_FLAGS if flag in present)


def cpu_model() -> str:
    """The CPU's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def default_threads() -> int:
    """All cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit, marked `-dirty` when tracked sources differ from it; `unknown` outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
    return f"{head}-dirty" if changed else head


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment(threads: int) -> dict[str, object]:
    """Everything about the machine and the software, for the JSON beside the CSV."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
        "cores": default_threads(),
        "threads": threads,
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _matmul_rate() -> float:
    """FLOP/s of a float32 product of two 1024 x 1024 matrices."""
    a = torch.ones(1024, 1024)
    start = time.perf_counter()
    a @ a
    return 2 * 1024**3 / (time.perf_counter() - start)


def probe(name: str, seconds: float, threads: int) -> Callable[[], float]:
    """A machine limit measured by a hand-written loop of the extension: FLOP/s, exps/s, or bytes read and written/s.

    `name` is `fma_peak`, `exp_rate` or `copy_bandwidth`, which raise Unavailable where the extension is not built, or
    `matmul`: torch's own float32 product, a peak no FMA loop may fall below.
    """
    if name == "matmul":
        return _matmul_rate
    try:
        from setformer_kernels import _C
    except ImportError as error:
        raise Unavailable("the extension is not built") from error
    size = (COPY_BYTES,) if name == "copy_bandwidth" else ()
    return lambda: float(getattr(_C, name)(seconds, threads, *size))
