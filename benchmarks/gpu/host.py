"""Host time of one eager call, and its peak memory on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.cases import FORWARD
from benchmarks.gpu.cases import GpuCase, Inputs, inputs, set_attention

HOST_CALLS = 100


def peak_extra(run: Callable[[Inputs], Tensor], x: Inputs) -> int:
    """Bytes at the peak of a forward and backward, beyond what was there before, the output and the gradients."""
    torch.autograd.grad(run(x), x[:4], x.d_output)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run(x)
    gradients = torch.autograd.grad(output, x[:4], x.d_output)
    asked_for = sum(t.numel() * t.element_size() for t in (output, *gradients))
    return torch.cuda.max_memory_allocated() - before - asked_for


@contextmanager
def _first_launch(case: GpuCase) -> Iterator[list[float]]:
    """When Triton's first launch of a call returned."""
    from benchmarks.compiled import workloads
    from setformer_kernels.backends.triton.host import launch

    sizes = {"B": case.B, "H": case.H, "L": case.L, "D": case.D, "E": case.D, "M": case.M}
    first = workloads.launches(workloads.Call("attention", dtype=case.dtype, **sizes), "sm_90")[0].kernel
    marks: list[float] = []
    plain = launch.start

    def marked(kernel: Any, *launched: Any) -> None:
        plain(kernel, *launched)
        if kernel is first:
            marks.append(time.perf_counter())

    launch.start = marked
    try:
        yield marks
    finally:
        launch.start = plain


@contextmanager
def _whole_call(case: GpuCase) -> Iterator[list[float]]:
    yield []


def host_times(case: GpuCase, backend: str, device: str) -> list[float]:
    """Seconds from the call of set_attention to the return of its first kernel's launch, the queue empty.

    A call of the CUDA C++ backend is one launch, which Python does not see: it is the return of the call.
    """
    x = inputs(replace(case, mode=FORWARD), device)
    samples = []
    with torch.no_grad(), (_whole_call if backend == "cuda" else _first_launch)(case) as marks:
        for _ in range(HOST_CALLS if device == "cuda" else 3):
            if device == "cuda":
                torch.cuda.synchronize()
            marks.clear()
            start = time.perf_counter()
            set_attention(x, 3, backend)
            end = time.perf_counter()
            if backend != "cuda" and not marks:
                raise RuntimeError(f"no first launch of {backend} was seen")
            samples.append((marks[0] if marks else end) - start)
    return samples[len(samples) // 10 :]
