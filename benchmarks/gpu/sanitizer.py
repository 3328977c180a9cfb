"""compute-sanitizer on every kernel at small sizes, the CUDA C++ kernels first, the tools side by side."""

from __future__ import annotations

import re

from benchmarks.gpu.process import Child, child, children, last_line, module
from benchmarks.gpu.steps import FAILED, OK, SKIPPED, Run, Step, shares

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck", "synccheck", "initcheck")
REFUSED = re.compile(
    r"Device not supported|Target application terminated before first|Unable to find|not permitted", re.I
)
NO_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor has bounds that memcheck sees
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
            watched |= _tools(run, name, tool, smoke, deadline, notes, errors)
    if tool is None:
        notes.append(f"{TOOL} is not on the PATH")
    outcome = FAILED if errors or not (notes or errors) else OK if watched else SKIPPED
    said = [*notes, *(error.splitlines()[0] for error in errors)]
    return Step("sanitizer", outcome, "; ".join(said) or "no backend passed its canary", details=tuple(errors))


def _under(tool: str, check: str, smoke: list[str]) -> list[str]:
    """The command that watches the calls."""
    # To initcheck, what a kernel wrote that it does not watch was never written: it watches all, as ours read what
    # torch's wrote, and so do those of torch's that have the substring (`where`).
    ours = () if check == "initcheck" else ("--kernel-name", "kernel_substring=_kernel")
    return [tool, "--tool", check, *ours, "--error-exitcode", str(FOUND), *smoke]


def _tools(
    run: Run, name: str, tool: str, smoke: list[str], deadline: float, notes: list[str], errors: list[str]
) -> bool:
    """Whether a tool has watched a backend.  Each is slow, so they run side by side, as many as there are cores for."""
    watched = False
    checks = {c: Child(_under(tool, c, smoke), run.logs / f"{name}_{c}.log", NO_CACHING) for c in CHECKS}
    children(run.system, list(checks.values()), deadline - run.system.now(), shares())
    for check, one in checks.items():
        what, output = f"{name} {check}", one.output()
        if one.process is None:
            notes.append(f"{what}: out of time")
        elif one.status is None:
            notes.append(f"{what}: out of time at {last_line(output)}")
        elif one.status and REFUSED.search(output):
            notes.append(f"{what}: refused by this machine")
        elif one.status:
            errors.append(f"{what}: {last_line(output)}\n{output[-3000:]}")
        else:
            notes.append(f"{what}: {last_line(output)}")
            watched = True
    return watched
