"""Peak extra memory of one forward + backward, each case in a process of its own.

The process warms up on a tiny input (thread pools, lazy imports), allocates the inputs and the output gradient and
touches them, resets the kernel's high-water mark of resident memory, then makes its first full-size call.

    extra = high-water mark − resident before the call − bytes of o and of the gradients

`o` and the gradients are what the caller asked for; everything else is the implementation's own.  Large blocks go
straight to mmap (see CHILD_ENV), so that a freed tensor leaves the resident set at once and is not counted twice.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common.cases import BOTH, AttentionCase, Entry, MemoryCase, attention_inputs, query_mask
from benchmarks.common.hardware import CHILD_ENV, ROOT, Unavailable
from benchmarks.common.implementations import attention, has_references

WARM_UP_LENGTH = 64
NO_HIGH_WATER = 3  # exit status of a child on a system without a resettable high-water mark


def resident(field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise Unavailable(f"/proc/self/status has no {field}")
    return int(match.group(1)) * 1024


def reset_high_water() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise Unavailable(f"the high-water mark cannot be reset: {error}") from error


def peak_extra(entry: Entry, L: int, mask: str = "") -> int:
    """Bytes beyond inputs, output and gradients that one forward + backward of this process needs at its peak."""
    case = AttentionCase("memory", L, BOTH)
    run = attention(entry, mask)
    leaves = slice(None) if has_references(entry) else slice(3)
    # A compiled graph belongs to its shapes: its first call compiles, which is no part of a training step.
    warm = attention_inputs(case if entry.impl == "compiled" else AttentionCase("memory", WARM_UP_LENGTH, BOTH))
    torch.autograd.grad(run(warm), warm.leaves()[leaves], warm.grad_output)
    del warm
    x = attention_inputs(case)
    query_mask(mask, L)  # an input, too
    gc.collect()
    reset_high_water()
    before = resident("VmRSS")
    output = run(x)
    gradients = torch.autograd.grad(output, x.leaves()[leaves], x.grad_output)
    asked_for = sum(tensor.numel() * tensor.element_size() for tensor in (output, *gradients))
    return resident("VmHWM") - before - asked_for


def measure(case: MemoryCase, threads: int) -> int:
    """`peak_extra` in a fresh process; RuntimeError with the child's error where the call itself failed."""
    command = [sys.executable, "-m", "benchmarks.cpu.memory", case.entry.impl, str(case.entry.T or 0), str(case.L)]
    command += [str(threads), *([case.mask] if case.mask else [])]
    environment = {**os.environ, **CHILD_ENV, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode == NO_HIGH_WATER:
        raise Unavailable(done.stderr.strip())
    if done.returncode:
        errors = re.findall(r"^\w+(?:\.\w+)*(?:Error|Exception)\b.*$", done.stderr, re.MULTILINE)
        raise RuntimeError(errors[-1] if errors else f"exit status {done.returncode}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_extra"])


def main() -> None:
    """Entry of the child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("impl")
    parser.add_argument("T", type=int, help="iterations; ignored by implementations without any")
    parser.add_argument("L", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("mask", nargs="?", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    T = None if arguments.impl in ("sdpa", "elu") else arguments.T
    try:
        print(json.dumps({"peak_extra": peak_extra(Entry(arguments.impl, T), arguments.L, arguments.mask)}))
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        sys.exit(NO_HIGH_WATER)


if __name__ == "__main__":
    main()
