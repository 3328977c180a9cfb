"""compute-sanitizer on every kernel at small sizes, a tool after the other, the CUDA C++ kernels first."""

from __future__ import annotations

import re

from benchmarks.gpu.process import LEAST_S, child, last_line, module
from benchmarks.gpu.steps import FAILED, OK, SKIPPED, Run, Step

TOOL = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
REFUSED = re.compile(
    r"Device not supported|Target application terminated before first|Unable to find|not permitted", re.I
)
FOUND = 9  # exit status where a tool has found something
# Backend -> what of it is watched.  Triton's kernels differ in dtype by little but the products; each is slow here.
WATCHED: dict[str, tuple[str, ...]] = {"cuda": (), "triton": ("--dtype", "bfloat16")}


def step(run: Run, seconds: float) -> Step:
    """The calls alone, which compiles them, then under each tool; a backend that fails alone is watched by none."""
    if run.dry:
        return Step("sanitizer", SKIPPED, "kernels are interpreted")
    deadline, tool = run.system.now() + seconds, run.system.which(TOOL)
    notes: list[str] = []
    errors: list[str] = []
    watched = False
    for name in sorted(run.alive(), key=list(WATCHED).index):
        smoke = module("smoke", "--backend", name, *WATCHED[name])
        left = max(deadline - run.system.now(), 0.0)
        status, output = child(run.system, smoke, left, run.logs / f"smoke_{name}.log")
        if status is None:
            notes.append(f"{name}: out of time at {last_line(output)}")
        elif status:
            errors.append(f"{name} without a tool: {last_line(output)}\n{output[-3000:]}")
        elif tool is None:
            notes.append(f"{name}: {last_line(output)}")
        else:
            watched |= _tools(run, name, [tool, *OPTIONS], smoke, deadline, notes, errors)
    if tool is None:
        notes.append(f"{TOOL} is not on the PATH")
    outcome = FAILED if errors or not (notes or errors) else OK if watched else SKIPPED
    said = [*notes, *(error.splitlines()[0] for error in errors)]
    return Step("sanitizer", outcome, "; ".join(said) or "no backend passed its canary", details=tuple(errors))


OPTIONS = ("--kernel-name", "kernel_substring=_kernel", "--error-exitcode", str(FOUND))


def _tools(
    run: Run, name: str, base: list[str], smoke: list[str], deadline: float, notes: list[str], errors: list[str]
) -> bool:
    """Whether a tool has watched a backend."""
    watched = False
    for tool in TOOLS:
        left, what = deadline - run.system.now(), f"{name} {tool}"
        if left < LEAST_S:
            notes.append(f"{what}: out of time")
            continue
        log = run.logs / f"{name}_{tool}.log"
        command = [*base[:1], "--tool", tool, *base[1:], *smoke]
        status, output = child(run.system, command, left, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status is None:
            notes.append(f"{what}: out of time at {last_line(output)}")
        elif status and REFUSED.search(output):
            notes.append(f"{what}: refused by this machine")
        elif status:
            errors.append(f"{what}: {last_line(output)}\n{output[-3000:]}")
        else:
            notes.append(f"{what}: {last_line(output)}")
            watched = True
    return watched
