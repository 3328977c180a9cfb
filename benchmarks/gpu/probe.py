"""The GPU's own limits: a large copy, a product, and a kernel that does little but exponentials."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.cases import Call, GpuPlan

BLOCK, CHAINS = 1024, 64


def _copy(plan: GpuPlan) -> tuple[Call, float]:
    source = torch.ones(int(plan.probe_scale * 2**28), device=plan.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.numel() * 4


def _matmul(plan: GpuPlan) -> tuple[Call, float]:
    n = 8192 if plan.probe_scale == 1 else 64
    a, b = (torch.randn(n, n, device=plan.device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b, 2.0 * n**3


def _exponentials(plan: GpuPlan) -> tuple[Call, float]:
    """A launch, and how many exponentials it computes."""
    from benchmarks.gpu.exponentials import exp_kernel

    blocks, turns = (132 * 32, 64) if plan.probe_scale == 1 else (1, 1)
    out = torch.full((blocks * BLOCK,), 0.5, device=plan.device)
    return lambda: exp_kernel[(blocks,)](out, turns, BLOCK, CHAINS), float(blocks * BLOCK * turns * CHAINS)


# Name -> unit, and what makes the call and says how much of the unit it does.
PROBES: dict[str, tuple[str, Callable[[GpuPlan], tuple[Call, float]]]] = {
    "copy bandwidth": ("bytes/s", _copy),
    "matmul": ("FLOP/s", _matmul),
    "exp rate": ("exp/s", _exponentials),
}
