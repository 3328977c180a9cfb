"""What a step of one attention layer costs over many GPUs, forward and backward: a model, none of it measured on ranks.

Communication is bytes over an assumed bandwidth and messages times an assumed latency; computation is what one GPU was
measured to take for 65536 tokens, scaled: by the tokens of a rank for SeT, by all pairs over the ranks for softmax.

    SeT       all-gathers of M(T + E) float32 a head each way: (R − 1) of them arrive at a rank
    ring      keys and values go round, 2·(R − 1)/R·L·H·D, and twice as much in the backward pass
    Ulysses   q, k, v and o change hands, 4·(R − 1)/R·L/R·H·D, and as much in the backward pass; R ≤ H
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEASURED = "gpu_h100_2026-11-26.csv"
AT = 65536  # tokens of the measured calls
HALF, SINGLE = 2, 4  # bytes


class Machine(NamedTuple):
    """Assumptions: nodes of 8 GPUs with NVLink between them, and one 400 Gb/s port a GPU between nodes."""

    of_node: int = 8
    inside: float = 450e9  # bytes/s that a GPU receives from its node
    between: float = 50e9  # bytes/s that a GPU receives from other nodes
    latency: float = 10e-6  # s a message


class Layer(NamedTuple):
    heads: int = 16
    references: int = 64
    width: int = 64  # D and E
    iterations: int = 3


class Cost(NamedTuple):
    impl: str
    tokens: int
    ranks: int
    bytes: float  # that arrive at a rank, forward and backward
    communication: float  # s
    computation: float  # s


def seconds_of(folder: Path) -> dict[str, float]:
    """What one GPU took for 65536 tokens, forward and backward: SeT by Triton, and the fastest of softmax."""
    wanted = ("headline", "forward+backward", str(AT))
    with (folder / MEASURED).open() as file:
        rows = [r for r in csv.DictReader(file) if (r["case"], r["mode"], r["L"]) == wanted]
    softmax = [float(r["median"]) for r in rows if r["impl"].startswith("sdpa")]
    own = next(float(r["median"]) for r in rows if (r["impl"], r["T"]) == ("triton", "3"))
    return {"set": own, "sdpa": min(softmax)}


def _arrives(n: float, messages: float, ranks: int, on: Machine) -> float:
    return n / (on.inside if ranks <= on.of_node else on.between) + messages * on.latency


def costs(tokens: int, ranks: int, took: dict[str, float], on: Machine, of: Layer) -> Iterator[Cost]:
    """Of each way that R ranks can go."""
    others, T = ranks - 1, of.iterations
    sent = SINGLE * of.heads * of.references * (T + of.width)
    n = 2.0 * others * sent
    messages = 2 * T * math.ceil(math.log2(ranks))
    yield Cost("set", tokens, ranks, n, _arrives(n, messages, ranks, on), took["set"] * tokens / ranks / AT)
    pairs = took["sdpa"] * (tokens / AT) ** 2 / ranks
    n = 3 * 2.0 * others / ranks * tokens * of.heads * of.width * HALF
    yield Cost("ring", tokens, ranks, n, _arrives(n, 2 * others, ranks, on), pairs)
    if ranks <= of.heads:
        n = 2 * 4.0 * others / ranks * tokens / ranks * of.heads * of.width * HALF
        yield Cost("ulysses", tokens, ranks, n, _arrives(n, 8, ranks, on), pairs)


TOKENS = [2**n for n in (17, 20, 22, 24)]
RANKS = (8, 16, 64, 256, 1024)


def table(folder: Path, on: Machine | None = None, of: Layer | None = None) -> list[Cost]:
    took = seconds_of(folder)
    sizes = [(tokens, ranks) for tokens in TOKENS for ranks in RANKS]
    return [cost for size in sizes for cost in costs(*size, took, on or Machine(), of or Layer())]


def rendered(found: list[Cost]) -> str:
    """Markdown: milliseconds of communication + computation, a line for each size."""
    by_size: dict[tuple[int, int], dict[str, Cost]] = {}
    for cost in found:
        by_size.setdefault((cost.tokens, cost.ranks), {})[cost.impl] = cost
    on, of = Machine(), Layer()
    lines = [
        "# Predicted: one layer over many GPUs",
        "",
        "A model (`benchmarks/scale/costs.py`), not a measurement: milliseconds of communication + computation of one",
        f"layer, forward and backward: {of.heads} heads, D = E = M = {of.width}, T = {of.iterations}, bfloat16.",
        "",
        f"Assumed: a GPU receives {on.inside / 1e9:.0f} GB/s inside a node of {on.of_node}, {on.between / 1e9:.0f} GB/s"
        f" between nodes, {on.latency * 1e6:.0f} µs a message, and nothing overlaps. Computation: what an H100 took",
        f"for {AT} tokens (`benchmarks/results/{MEASURED}`), scaled. SeT's passes over ranks are kernels of their",
        "own, which no GPU was measured with: the fused call stands for them.",
        "",
        "| tokens | GPUs | SeT | ring attention | Ulysses | bytes that arrive: SeT / ring |",
        "|---|---|---|---|---|---|",
    ]
    for (tokens, ranks), ways in by_size.items():
        cells = [
            f"{1e3 * way.communication:.3g} + {1e3 * way.computation:.3g}" if (way := ways.get(name)) else "R > H"
            for name in ("set", "ring", "ulysses")
        ]
        ring, own = ways["ring"].bytes / 1e6, ways["set"].bytes / 1e6
        size = f"{tokens // 2**20} M" if tokens >= 2**20 else f"{tokens // 2**10} k"
        lines.append(f"| {size} | {ranks} | {' | '.join(cells)} | {own:.3g} MB / {ring:,.0f} MB |")
    return "\n".join(lines) + "\n"
