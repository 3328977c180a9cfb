"""What is timed on a GPU and against what; the same code runs on the CPU at tiny sizes, to be tested without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import setformer_kernels.functional as SF
from benchmarks.common.cases import BANDWIDTH, BOTH, EPSILON, FORWARD
from setformer_kernels.problem import Problem

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Call = Callable[[], object]


@dataclass(frozen=True)
class GpuCase:
    """One size and mode; what it is timed against, and the T it is timed at."""

    name: str  # "headline", "sweep", "windows", "causal", "masked"
    L: int
    mode: str
    B: int = 1
    H: int = 16
    D: int = 64
    M: int = 64
    dtype: torch.dtype = torch.bfloat16
    iterations: tuple[int, ...] = (3, 1)
    compiled: bool = False
    reference: bool = True
    causal: bool = False  # a scan at T = 1, a walk of every pair beyond

    def token_bytes(self) -> int:
        """Size of one of q, k, v, o."""
        return self.B * self.H * self.L * self.D * self.dtype.itemsize


@dataclass(frozen=True)
class GpuPlan:
    """One run."""

    device: str
    cases: tuple[GpuCase, ...]
    memory: tuple[GpuCase, ...]
    host: GpuCase
    check: GpuCase
    sinkhorn: tuple[tuple[int, int, int, int], ...]  # problems, rows, columns, iterations
    probe_scale: float  # 1: sizes that fill a GPU


def problems(case: GpuCase, device: str) -> list[Problem]:
    """What a backend is asked whether it runs a case: its forward and, where it has one, its backward."""
    sizes = {"D": case.D, "E": case.D, "M": case.M, "N": case.L, "B": case.B, "H": case.H, "L": case.L}
    T = max(case.iterations)
    op = "attention" if not case.causal else "causal" if T <= 1 else "masked"
    forward = Problem(op, device, case.dtype, num_iters=T, **sizes)
    return [forward, replace(forward, backward=True)] if case.mode == BOTH else [forward]


MODES = (FORWARD, BOTH)


def full_plan() -> GpuPlan:
    """The GPU rows of the design, most important first; compiling is slow, so few cases are compiled."""
    headline = tuple(GpuCase("headline", L, mode) for mode in MODES for L in (4096, 16384, 65536))
    against = tuple(
        GpuCase("compiled", L, mode, iterations=(3,), compiled=True, reference=False)
        for L, mode in ((16384, FORWARD), (65536, FORWARD), (16384, BOTH))
    )
    sweep = tuple(
        GpuCase("sweep", L, mode, B=8, reference=False)
        for mode in reversed(MODES)
        for L in (128, 256, 512, 1024, 2048, 4096)
    )
    windows = tuple(GpuCase("windows", L, mode, B=256, reference=False) for mode in MODES for L in (49, 196))
    many = tuple(GpuCase("many heads", 4096, mode, B=9, reference=False) for mode in MODES)  # 144: every processor
    causal = tuple(
        GpuCase(name, L, mode, iterations=(T,), reference=False, causal=True)
        for name, T, lengths in (("causal", 1, (1024, 4096, 16384)), ("masked", 3, (1024, 4096)))
        for mode in MODES
        for L in lengths
    )
    # Only compiled: what the sweep and the windows leave out, last because torch.compile is slow.
    beside = tuple(
        replace(case, name=f"{case.name} compiled", iterations=(3,), compiled=True)
        for case in sorted((*sweep, *windows, *many), key=lambda case: MODES.index(case.mode))
        if case.L not in (128, 4096) or case.name == "many heads"
    )
    memory = tuple(GpuCase("memory", L, BOTH) for L in (4096, 16384))
    host = GpuCase("host", 4096, FORWARD)
    check = GpuCase("check", 1000, BOTH, B=2, H=4)
    sinkhorn = ((64, 1024, 64, 20), (16, 256, 256, 50))
    cases = headline + sweep + windows + many + causal + against + beside
    return GpuPlan("cuda", cases, memory, host, check, sinkhorn, 1.0)


def dry_plan() -> GpuPlan:
    """Every path of the measuring code on CPU tensors; its numbers mean nothing."""
    small = {"B": 1, "H": 2, "D": 16, "M": 16}
    cases = (
        *(GpuCase("headline", 16, mode, **small) for mode in MODES),
        GpuCase("sweep", 16, BOTH, iterations=(3,), reference=False, **small),
        GpuCase("windows", 9, BOTH, iterations=(3,), reference=False, **small),
        GpuCase("many heads", 16, FORWARD, iterations=(3,), reference=False, **small),
        GpuCase("causal", 16, BOTH, iterations=(1,), reference=False, causal=True, **small),
        GpuCase("masked", 16, FORWARD, iterations=(3,), reference=False, causal=True, **small),
        *(
            GpuCase(name, 16, FORWARD, iterations=(3,), compiled=True, reference=False, **small)
            for name in ("compiled", "sweep compiled", "windows compiled", "many heads compiled")
        ),
    )
    tiny = GpuCase("memory", 32, BOTH, **small)
    # Triton's interpreter truncates where a GPU rounds to nearest: only float32 is as exact there.
    check = GpuCase("check", 40, BOTH, dtype=torch.float32, **small)
    host = GpuCase("host", 16, FORWARD, **small)
    return GpuPlan("cpu", cases, (tiny,), host, check, ((2, 16, 16, 3),), 1e-3)


def plan_of(dry: bool) -> GpuPlan:
    """The run's plan."""
    return dry_plan() if dry else full_plan()


# Step -> the names of its cases, in the order in which they are timed.
PARTS = {
    "headline": ("headline",),
    "sweep": ("sweep", "windows", "many heads", "causal", "masked"),
    "compiled": ("compiled", "sweep compiled", "windows compiled", "many heads compiled"),
}


class Inputs(NamedTuple):
    """Tensors of one case."""

    query: Tensor  # [B, H, L, D]
    key: Tensor
    value: Tensor
    references: Tensor  # [H, M, D] float32
    d_output: Tensor


def inputs(case: GpuCase, device: str) -> Inputs:
    """Standard normal inputs from a fixed seed; leaves require gradients when the case has a backward."""
    generator = torch.Generator(device).manual_seed(case.L)
    shape = (case.B, case.H, case.L, case.D)

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, k, v, d_o = (normal(shape, case.dtype) for _ in range(4))
    y = normal((case.H, case.M, case.D), torch.float32)
    for leaf in (q, k, v, y):
        leaf.requires_grad_(case.mode == BOTH)
    return Inputs(q, k, v, y, d_o)


def set_attention(x: Inputs, T: int, backend: str, causal: bool = False) -> Tensor:
    """SeT attention with the benchmark's constants."""
    options = {"bandwidth": BANDWIDTH, "epsilon": EPSILON, "num_iters": T, "causal": causal, "backend": backend}
    return SF.set_attention(*x[:4], **options)


def sdpa(x: Inputs, backend: SDPBackend | None, causal: bool = False) -> Tensor:
    """Softmax attention by one backend of PyTorch (None: whatever it chooses)."""
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=causal)


def compiled_reference(T: int) -> Callable[[Inputs], Tensor]:
    """The reference under torch.compile, for the shapes of its first call."""
    run = torch.compile(functools.partial(set_attention, T=T, backend="reference"), fullgraph=True, dynamic=False)
    return lambda x: run(x)


def timed_call(run: Callable[[Inputs], Tensor], x: Inputs, mode: str, leaves: int) -> Call:
    """A forward without autograd, or a forward and the gradients of the first `leaves` inputs."""
    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return run(x)

        return forward
    return lambda: torch.autograd.grad(run(x), x[:leaves], x.d_output)


def copies(case: GpuCase, device: str) -> Call:
    """Moves as many token tensors as the case cannot avoid, half of them read: 4 forward, 11 forward and backward."""
    moves = 4 if case.mode == FORWARD else 11
    source = torch.ones(moves * case.token_bytes() // 2 // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
