"""What is measured: sizes, inputs and the two plans (full and quick).

Letters as in the package: `B` batch, `H` heads, `L` queries, `S` keys (= L here), `M` references, `D` head dim,
`E` value head dim, `T` iterations.  For `sinkhorn`: `G` problems of `N` rows and `M` columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD = "forward"
BOTH = "forward+backward"
MODES = (FORWARD, BOTH)

BANDWIDTH, EPSILON = 1.0, 0.05


class Entry(NamedTuple):
    """One implementation at one T; T is None where the implementation has no iterations (SDPA, elu)."""

    impl: str
    T: int | None

    def __str__(self) -> str:
        return self.impl if self.T is None else f"{self.impl} T={self.T}"


SET_T3 = Entry("set", 3)
SET_T1 = Entry("set", 1)
ENTRIES = (
    SET_T3,
    SET_T1,
    Entry("sdpa", None),
    Entry("reference", 3),
    Entry("reference", 1),
    Entry("compiled", 3),
    Entry("compiled", 1),
    Entry("elu", None),
)


@dataclass(frozen=True)
class AttentionCase:
    """One size and mode at which all `entries` are timed together, in interleaved rounds."""

    name: str
    L: int
    mode: str
    entries: tuple[Entry, ...] = ENTRIES
    budget_s: float = 3.0
    with_peak: bool = False  # a sample of the FMA peak in every round
    mask: str = ""  # one of MASKS: what every query sees
    by_token: bool = False  # in memory [B, L, H, ·]
    B: int = 1
    H: int = 8
    D: int = 64
    E: int = 64
    M: int = 64

    def matmul_flops(self) -> int:
        """FLOPs of the four products of a forward (logits of keys and queries, pool, read).

        Exponentials, norms and the iterations are not counted, so a share of peak computed from this is a lower bound.
        """
        return 2 * self.B * self.H * (2 * self.L) * self.M * (self.D + self.E)

    def exps(self) -> int:
        """Exponentials no algorithm can avoid: κ and e^ℓ of keys and of queries."""
        return 2 * self.B * self.H * (2 * self.L) * self.M

    def qkvo_bytes(self) -> int:
        """Size of q, k, v and o together in float32."""
        return 4 * self.B * self.H * self.L * 2 * (self.D + self.E)


class AttentionInputs(NamedTuple):
    """The tensors of one attention case."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, H, S, D]
    value: Tensor  # [B, H, S, E]
    references: Tensor  # [H, M, D]
    grad_output: Tensor  # [B, H, L, E]

    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that get gradients."""
        return self.query, self.key, self.value, self.references


def attention_inputs(case: AttentionCase, device: str = "cpu") -> AttentionInputs:
    """Standard normal inputs from a fixed seed; leaves require gradients when the case has a backward."""
    generator = torch.Generator().manual_seed(case.L)
    B, H, L, D, E, M = case.B, case.H, case.L, case.D, case.E, case.M
    shapes = ((B, H, L, D), (B, H, L, D), (B, H, L, E), (H, M, D), (B, H, L, E))
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    if case.by_token:
        tensors = [t if t.ndim == 3 else t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    for leaf in tensors[:4]:
        leaf.requires_grad_(case.mode == BOTH)
    return AttentionInputs(*tensors)


PACKED = "packed"


def pack_offsets(B: int, L: int) -> Tensor:
    """[B + 1] of B sequences, lengths uniform from 1 to 2 L before they are scaled to B·L tokens."""
    lengths = torch.randint(1, 2 * L + 1, (B,), generator=torch.Generator().manual_seed(L)).cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths * (B * L) // lengths[-1]])


MASKS = ("causal", "float", "window")
WINDOW = 128  # keys a query sees under "window"


@functools.lru_cache(maxsize=1)
def query_mask(mask: str, L: int) -> Tensor | None:
    """[L, L], what all heads share: standard normal log masses, or a window; None where `causal` says it."""
    if mask == "float":
        return torch.randn(L, L, generator=torch.Generator().manual_seed(L))
    if mask != "window":
        return None
    ahead = torch.arange(L) - torch.arange(L).unsqueeze(1)
    return (ahead >= -WINDOW // 2) & (ahead < WINDOW // 2)


@dataclass(frozen=True)
class SinkhornCase:
    """`G` transport problems of `N` rows and `M` columns, uniform masses, a fixed number of iterations."""

    name: str
    G: int
    N: int
    M: int
    T: int
    mode: str = FORWARD
    entries: tuple[str, ...] = ("set", "reference", "plain", "pot", "pot-scaling", "geomloss")
    budget_s: float = 8.0


def sinkhorn_log_kernel(case: SinkhornCase) -> Tensor:
    """(κ(x, y) − 1)/ε [G, N, M] for random unit vectors: the cost that attention transports along."""
    generator = torch.Generator().manual_seed(case.N)
    x = torch.nn.functional.normalize(torch.randn(case.G, case.N, 64, generator=generator), dim=-1)  # [G, N, D]
    y = torch.nn.functional.normalize(torch.randn(case.G, case.M, 64, generator=generator), dim=-1)  # [G, M, D]
    kappa = torch.exp(BANDWIDTH * (x @ y.transpose(-1, -2) - 1))  # [G, N, M]
    return ((kappa - 1) / EPSILON).contiguous().requires_grad_(case.mode == BOTH)


@dataclass(frozen=True)
class MemoryCase:
    """Peak extra memory of one forward + backward of one implementation, in a process of its own."""

    entry: Entry
    L: int
    mask: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything one run measures."""

    attention: tuple[AttentionCase, ...]
    sinkhorn: tuple[SinkhornCase, ...]
    memory: tuple[MemoryCase, ...]
    check_lengths: tuple[int, ...]
    probe_s: float  # length of one sample of a machine probe
    max_call_s: float = 4.0  # implementations slower than this per call are skipped
    compile: bool = True


# Compiling costs more than measuring, so `compiled` is timed at some lengths only.
COMPILED_LENGTHS = (256, 1024, 4096, 16384, 65536)


def _sweep(lengths: tuple[int, ...], budget_s: float) -> tuple[AttentionCase, ...]:
    def entries(L: int) -> tuple[Entry, ...]:
        return tuple(e for e in ENTRIES if e.impl != "compiled" or (e.T == 3 and L in COMPILED_LENGTHS))

    return tuple(AttentionCase("sweep", L, mode, entries(L), budget_s=budget_s) for mode in MODES for L in lengths)


def _masked(lengths: tuple[int, ...], budget_s: float) -> tuple[AttentionCase, ...]:
    """SeT and softmax under the same mask; one iteration under a causal one is a scan."""
    entries = (SET_T3, SET_T1, Entry("sdpa", None))
    return tuple(
        AttentionCase(mask, L, mode, entries, budget_s=budget_s, mask=mask)
        for mask in MASKS
        for mode in MODES
        for L in lengths
    )


def _packed(B: int, L: int, budget_s: float) -> tuple[AttentionCase, ...]:
    """A packed batch beside a dense one of as many tokens, whose sequences all have the mean length."""
    entries = (SET_T1, SET_T3, Entry(PACKED, 1), Entry(PACKED, 3))
    return tuple(AttentionCase(PACKED, L, mode, entries, budget_s, by_token=True, B=B, H=2) for mode in MODES)


def full_plan() -> Plan:
    """The run behind the README's table and plot: some 15 minutes on two cores."""
    headline = tuple(
        AttentionCase("headline", 4096, mode, budget_s=budget, with_peak=True)
        for mode, budget in zip(MODES, (10.0, 18.0), strict=True)
    )
    lengths = tuple(2**n for n in range(6, 17))
    sinkhorn = (
        SinkhornCase("sinkhorn", G=8, N=4096, M=64, T=20),
        SinkhornCase("sinkhorn", G=16, N=256, M=256, T=50),
        SinkhornCase("sinkhorn", G=8, N=4096, M=64, T=20, mode=BOTH, entries=("set", "reference", "plain", "pot")),
    )
    small = tuple(MemoryCase(entry, 4096) for entry in ENTRIES if entry != Entry("compiled", 1))
    large = tuple(MemoryCase(entry, 16384) for entry in (SET_T3, SET_T1, Entry("reference", 3), Entry("elu", None)))
    masked = tuple(MemoryCase(SET_T3, 4096, mask) for mask in MASKS)
    attention = headline + _sweep(lengths, 2.5) + _masked((256, 1024, 2048, 4096, 8192), 2.0) + _packed(1000, 256, 12.0)
    return Plan(attention, sinkhorn, small + large + masked, (64, 1000, 4096), 0.05)


def quick_plan() -> Plan:
    """Every code path in seconds; the numbers mean little."""
    lengths = (64, 256)
    headline = tuple(AttentionCase("headline", 256, mode, budget_s=0.2, with_peak=True) for mode in MODES)
    sinkhorn = (
        SinkhornCase("sinkhorn", G=2, N=128, M=16, T=5, budget_s=0.3),
        SinkhornCase("sinkhorn", G=2, N=128, M=16, T=5, mode=BOTH, entries=("set", "plain", "pot"), budget_s=0.3),
    )
    memory = (MemoryCase(SET_T3, 512), MemoryCase(SET_T3, 512, "causal"))
    attention = headline + _sweep(lengths, 0.1) + _masked((256,), 0.1) + _packed(5, 16, 0.1)
    return Plan(attention, sinkhorn, memory, (64, 100), 0.01, compile=False)
