"""Which implementation runs a problem: pure functions of static facts, explaining every refusal."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from .backends import cpu, cuda, eager
from .backends.triton import face as triton
from .problem import Problem

REFERENCE = "reference"
# In the order `auto` tries them: cuda keeps on the chip what fits there, triton streams whatever there is.
NATIVE: dict[str, ModuleType] = {module.NAME: module for module in (cpu, cuda, triton)}
# Backends that `auto` passes over, where a later one can run the problem too, and when.
YIELDS: dict[str, Callable[[Problem], bool]] = {cuda.NAME: cuda.yields}
LARGE = 2**20  # logits of a call that is worth a word when it runs slowly: some 10 ms on the reference
EAGER = eager  # behind the ops where no native backend is left: an exported graph on another machine


class Chosen(str):
    """The name of the backend chosen for a call, in the place of the one `asked` for: its op has nothing to choose."""

    asked: str


@functools.cache
def chosen_for(name: str, asked: str) -> Chosen:
    chosen = Chosen(name)
    chosen.asked = asked
    return chosen


def asked_for(backend: str) -> str:
    return backend.asked if isinstance(backend, Chosen) else backend


def available_backends(problem: Problem | None = None) -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot run `problem` (an empty list: it can), in the order of `auto`.

    Without a problem: float32 attention on the CPU, D = E = M = 64.
    """
    problem = problem or typical_problem()
    return {name: module.unsupported_reasons(problem) for name, module in NATIVE.items()} | {REFERENCE: []}


def typical_problem(device: str = "cpu") -> Problem:
    return Problem("attention", device, torch.float32, D=64, E=64, M=64, num_iters=3)


def select(problem: Problem, requested: str = "auto") -> str:
    """The backend that runs `problem`; ValueError if the requested one is unknown or cannot, with its reasons."""
    if requested not in ("auto", REFERENCE) and requested not in NATIVE:
        raise ValueError(f"backend must be one of auto, {', '.join([*NATIVE, REFERENCE])}, got {requested!r}")
    # The TorchScript exporter of ONNX has no decompositions, as the newer one has, and ONNX no such ops.
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        return REFERENCE
    if requested == "auto":
        chosen = REFERENCE
        for name, module in NATIVE.items():
            if not module.unsupported_reasons(problem):
                chosen = name
                if name not in YIELDS or not YIELDS[name](problem):
                    break
        return chosen
    reasons = [] if requested == REFERENCE else NATIVE[requested].unsupported_reasons(problem)
    if reasons:
        raise ValueError(f"backend {requested!r} cannot run this call: {'; '.join(reasons)}")
    return requested


def absent(problem: Problem) -> list[str]:
    """What is missing on this machine, one sentence a backend, where nothing else keeps that backend from `problem`."""
    modules = [module for module in NATIVE.values() if module.ABSENT]
    return [module.ABSENT for module in modules if module.unsupported_reasons(problem) == [module.ABSENT]]


def choose(problem: Problem, requested: str, logits: int) -> str:
    """`select` for a call that forms so many logits ℓ: a large one that goes to the reference only because something
    is not installed says so, once in a process."""
    chosen = select(problem, requested)
    if chosen != REFERENCE or requested == REFERENCE:
        return chosen
    # under tracing there is nobody to tell, and sizes are symbols
    eager = not torch.compiler.is_compiling() and isinstance(logits, int)
    if eager and logits >= LARGE and (missing := absent(problem)):
        _tell("; ".join(missing))
    return chosen


@functools.cache
def _tell(missing: str) -> None:
    slow = "setformer_kernels runs on its reference, which is several times slower than its kernels"
    warnings.warn(f"{slow}: {missing}", stacklevel=4)


def implementation(problem: Problem, requested: str, logits: int = 0) -> ModuleType:
    """The backend module an op calls on real tensors: the selected native one, or the eager one.

    All backends save the same for the backward: where the requested one has none for this size, another one runs it.
    """
    if problem.backward and requested in NATIVE and NATIVE[requested].unsupported_reasons(problem):
        requested = "auto"
    return NATIVE.get(choose(problem, requested, logits), EAGER)
