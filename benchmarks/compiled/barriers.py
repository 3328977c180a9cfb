"""Cases in which the barriers of the CUDA kernels have work to do, and what the shim sees of a missing one.

A kernel whose barriers suffice gives the same bits in every schedule of the shim, and has no race.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from setformer_kernels.backends import cuda
from setformer_kernels.problem import Operands, Options, Sinkhorn

BF16, F16 = torch.bfloat16, torch.float16
PROCESSORS, SHARED = 132, 227 * 1024  # of an H100, and bytes that a block may have


class Case(Protocol):
    """What the kernels can be run on."""

    def results(self) -> list[Tensor]:
        """Everything that the forward and the backward write."""


class Attention(NamedTuple):
    """Sizes of one call, and what it has beside keys and queries."""

    B: int
    S: int
    L: int
    M: int
    D: int
    E: int
    dtype: torch.dtype = torch.float32
    epsilon: float = 0.05
    num_iters: int = 3
    kernel: str = "rbf"
    live: int = 0  # keys that take part; 0: all of them
    masses: bool = False  # of keys and references, −∞ among them, and relaxed marginals
    positions: bool = False
    dropout_p: float = 0.0
    pool: bool = False  # without queries, from gradients of z and c
    processors: int = PROCESSORS  # of the device: where it has few, a block takes several problems
    shared: int = SHARED
    at_once: tuple[int, int, int] = (0, 0, 0)  # clusters of 2, 4 and 8 that it runs; 0: nobody tells

    def operands(self) -> Operands:
        """The tensors, of one head."""
        draw = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        b, s, l, m, d, e = self[:6]
        x = dict.fromkeys(Operands._fields, None) | {
            "query": normal(b, 1, l, d).to(self.dtype),
            "key": normal(b, 1, s, d).to(self.dtype),
            "value": normal(b, 1, s, e).to(self.dtype),
            "references": normal(1, m, d),
        }
        if self.live:
            mass = torch.full((b, 1, s), -math.inf)
            mass[:, :, s // 2 : s // 2 + self.live] = 0.0
            x |= {"log_a": mass}
        if self.masses:
            mass = normal(b, 1, s)
            mass[:, :, ::5] = -math.inf
            x |= {"log_a": mass, "log_b": normal(1, m)}
        if self.positions:
            places = {"query": (b, 1, l, 2), "key": (b, 1, s, 2), "reference": (1, m, 2)}
            x |= {f"{name}_position": normal(*shape) for name, shape in places.items()}
        if self.dropout_p:
            x |= {"seed": torch.tensor(7)}
        return Operands(**x)  # type: ignore[arg-type]

    def results(self) -> list[Tensor]:
        cuda._C.set_devices([(self.processors, self.shared, self.at_once, any(self.at_once))])
        try:
            return self.written()
        finally:
            cuda._C.set_devices([(PROCESSORS, SHARED, (0, 0, 0), False)])

    def written(self) -> list[Tensor]:
        """On whatever device there is."""
        relaxed = 0.8 if self.masses else 1.0
        opt = Options((1.0, self.epsilon, relaxed, relaxed, 1.0), self.kernel, self.num_iters, self.dropout_p)
        x = self.operands()
        needs = [t is not None for t in x[:-1]] + [False]
        if self.pool:
            z, c = cuda.pool(x, opt)
            grads = cuda.pool_backward(x, opt, z, c, torch.ones_like(z), torch.cos(c), [False, *needs[1:]])
            return [z, c, *(t for t in grads if t is not None)]
        o, z, c = cuda.attention(x, opt)
        d_o = torch.cos(torch.arange(o.numel())).view(o.shape).to(self.dtype)
        grads = cuda.attention_backward(x, opt, z, c, d_o, needs)
        return [o, z, c, *(t for t in grads if t is not None)]


class Solver(NamedTuple):
    """One call of Sinkhorn."""

    G: int
    N: int
    M: int
    num_iters: int = 3
    tol: float | None = None

    def results(self) -> list[Tensor]:
        draw = torch.Generator().manual_seed(1)
        l = 2 * torch.randn(self.G, self.N, self.M, generator=draw)
        l[-1] *= 0.01  # nearly constant: it stops first where there is a tolerance
        if self.N > 5 and self.M > 5:
            l[0, 3], l[0, :, 2], l[0, 4, 5] = -math.inf, -math.inf, -math.inf
        masses = [torch.randn(self.G, n, generator=draw).log_softmax(-1) for n in (self.N, self.M)]
        relaxed = torch.full((self.G,), 0.9), torch.full((self.G,), 0.8)
        x = Sinkhorn(l, *masses, *relaxed, num_iters=self.num_iters, tol=self.tol)
        f, g, c, iters = cuda.sinkhorn(x)
        d_f, d_g = torch.cos(f).nan_to_num(), torch.sin(g).nan_to_num()
        grads = cuda.sinkhorn_backward(x, c, iters, d_f, d_g, (True,) * 5)
        return [f, g, c, iters, *(t for t in grads if t is not None)]


# One block and clusters, of all dtypes; references of one chunk and of several; all paths of the kernels.  ε = 0.002
# leaves the range of the scaled form: the kernels start again in the log domain.
CASES: dict[str, Case] = {
    "block": Attention(1, 60, 33, 7, 16, 16),
    "block of bf16": Attention(1, 60, 33, 20, 16, 16, BF16),
    "float16": Attention(1, 60, 33, 20, 16, 16, F16),
    "pair": Attention(1, 260, 150, 20, 16, 16),
    "pair of bf16": Attention(1, 260, 150, 64, 16, 12, BF16),
    "narrow": Attention(1, 260, 150, 64, 16, 16, BF16),
    "narrow, with masses": Attention(1, 260, 40, 50, 40, 24, F16, masses=True),
    "narrow passes": Attention(1, 90, 20, 64, 64, 200, BF16),
    "narrow problems": Attention(7, 120, 20, 64, 16, 16, BF16, processors=1),
    "narrow alone": Attention(1, 270, 260, 64, 16, 16, BF16, processors=1),  # 16 warps
    "narrow in a grid": Attention(2, 300, 40, 64, 16, 64, BF16, processors=8, shared=120 * 1024, at_once=(1, 1, 1)),
    "narrow in a grid, with masses": Attention(
        2, 300, 40, 50, 40, 24, F16, masses=True, processors=8, shared=120 * 1024, at_once=(1, 1, 1)
    ),
    "narrow passes in a grid": Attention(2, 520, 20, 64, 16, 200, BF16, num_iters=1, processors=8, at_once=(1, 1, 1)),
    "sinkhorn": Solver(2, 20, 37),
    "cluster of sinkhorn": Solver(1, 150, 70),
    "large sinkhorn": Solver(1, 300, 190, num_iters=1),
    "tolerance": Solver(2, 40, 40, num_iters=5, tol=0.05),
    "strips": Solver(1, 9, 700, num_iters=2),
    "one row": Solver(1, 1, 40),
    "one column": Solver(1, 40, 1),
    "steps": Attention(1, 400, 400, 16, 16, 16, BF16, processors=1),
    "rich": Attention(1, 260, 40, 20, 16, 16, BF16, masses=True, positions=True),
    "placed": Attention(1, 260, 40, 20, 16, 16, masses=True, positions=True),
    "dropout": Attention(1, 260, 40, 20, 16, 16, BF16, dropout_p=0.3),
    "pooling": Attention(1, 260, 1, 20, 16, 16, pool=True),
    "one live key": Attention(1, 620, 40, 16, 16, 16, live=1),
    "again": Attention(1, 260, 40, 20, 16, 16, epsilon=0.002),
    "again, bf16": Attention(1, 260, 40, 80, 16, 16, BF16, epsilon=0.002),
    "again, rich": Attention(1, 260, 40, 20, 16, 16, epsilon=0.002, masses=True, positions=True),
    "again in eight blocks": Attention(1, 1030, 1, 16, 16, 8, epsilon=0.002, num_iters=1),
    "passes": Attention(1, 260, 40, 80, 24, 100),
    "passes of bf16": Attention(1, 260, 40, 80, 24, 100, BF16),
    "dot": Attention(1, 260, 40, 20, 16, 16, BF16, kernel="dot", num_iters=1),
    "no iterations": Attention(1, 260, 40, 20, 16, 16, num_iters=0),
    "problems": Attention(5, 65, 17, 16, 16, 16, BF16, processors=1),
    "problems again": Attention(5, 65, 17, 16, 16, 16, epsilon=0.002, processors=1),
}


def digest(case: Case) -> str:
    """Of every bit of the results."""
    found = hashlib.sha256()
    for t in case.results():
        found.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def race(shim: ModuleType, case: Case) -> str:
    """The first race of a case; empty where there is none."""
    shim.watch_races(True)
    try:
        case.results()
    finally:
        shim.watch_races(False)
    return str(shim.found_race())


def deviating(shim: ModuleType, case: Case, schedules: Iterable[str], expected: str) -> str:
    """The first schedule whose bits are not the expected ones; empty where all are."""
    try:
        for name in schedules:
            shim.set_schedule(name)
            if digest(case) != expected:
                return name
    finally:
        shim.set_schedule(shim.SCHEDULES[0])
    return ""
