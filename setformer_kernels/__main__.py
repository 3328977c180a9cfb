"""`python -m setformer_kernels info`: versions, which backends can run, why others cannot, and what `auto` takes."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from dataclasses import replace

import torch

from . import __version__
from .backends.triton.face import TARGETS
from .dispatch import available_backends, select, typical_problem
from .problem import Problem


def versions() -> Iterator[str]:
    yield f"setformer_kernels {__version__}"
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    yield f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        platform_name = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        yield f"{platform_name}, {torch.cuda.get_device_name()}"


def typical_problems() -> Iterator[tuple[str, Problem]]:
    """What users run most, by name: half and full precision, causal and pooling, on every device of this machine."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        base = typical_problem(device)
        yield f"attention float32 {device}", base
        yield f"attention bfloat16 {device}", replace(base, dtype=torch.bfloat16)
        yield f"attention float64 {device}", replace(base, dtype=torch.float64)
        yield f"causal T=1 float32 {device}", replace(base, op="causal", num_iters=1)
        yield f"pool float32 {device}", replace(base, op="pool")


def info() -> Iterator[str]:
    yield from versions()
    yield "\nbackends (float32 attention, D = E = M = 64):"
    for name, reasons in available_backends(typical_problem()).items():
        yield f"  {name:<10} {'cannot run: ' + '; '.join(reasons) if reasons else 'can run'}"
    yield "\nkernels of the triton backend:"
    for target, state in TARGETS.items():
        yield f"  {target:<28} {state}"
    yield '\nbackend="auto" takes:'
    for title, problem in typical_problems():
        yield f"  {title:<26} {select(problem)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m setformer_kernels", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args()
    print("\n".join(info()))


if __name__ == "__main__":
    main()
