"""Passes over the keys, and time, to a marginal error of 1e-6: `python -m benchmarks.cpu.converged [table CSV]`.

Newton against Sinkhorn's iterations on the log kernels (κ − 1)/ε of S tokens and M references, uniform masses, float32.
A plan is that of the potentials g alone: rows are right by construction, and its error is Σ_j |column sum − 1/M| in
float64, the largest of the batch.  A method's passes are the first number of them after which that is at most 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import entry_point
from benchmarks.common.measure import interleave, paired_ratio, quartiles
from benchmarks.common.results import OK, Row, read_csv, stamp, write_csv
from setformer_kernels.functional import sinkhorn

ERROR = 1e-6
EPSILONS = (0.05, 0.01, 0.005)
NEWTON: dict[str, Any] = {"method": "newton", "grad": "implicit"}
# Implementations, Newton first: what the others are compared with.  Sinkhorn's on PyTorch has the same passes.
HOW: dict[str, dict[str, Any]] = {"newton": NEWTON, "sinkhorn": {"backend": "reference"}, "sinkhorn kernel": {}}
MOST = {"newton": 60, "sinkhorn": 2000}  # passes that are tried


@dataclass(frozen=True)
class Case:
    """One log kernel [B, S, M]."""

    data: str
    epsilon: float
    B: int = 1
    S: int = 4096
    M: int = 64

    @property
    def name(self) -> str:
        return f"converged, {self.data}, epsilon {self.epsilon}"

    def log_kernel(self) -> Tensor:
        """β = 1: random directions, or tokens around sixteen of them (`clusters`), which the references are not."""
        generator = torch.Generator().manual_seed(self.S)
        d = int(self.data.split()[-1])
        tokens, references, centres = (
            F.normalize(torch.randn(n, d, generator=generator), dim=-1) for n in (self.B * self.S, self.M, 16)
        )
        if self.data.startswith("clusters"):
            near = torch.randint(16, (self.B * self.S,), generator=generator)
            tokens = F.normalize(centres[near] + tokens / 2, dim=-1)
        kappa = torch.exp(tokens.view(self.B, self.S, d) @ references.T - 1)
        return (kappa - 1) / self.epsilon

    def rows(self, budget_s: float) -> list[Row]:
        """Passes in T, what was reached in note; `ratio` is a method's time over Newton's."""
        l = self.log_kernel()
        needed = {"newton": newton_passes(l), "sinkhorn": sinkhorn_passes(l)}
        needed["sinkhorn kernel"] = needed["sinkhorn"]
        samples = interleave({name: call(l, name, passes[0]) for name, passes in needed.items()}, budget_s)
        row = Row(self.name, "", "forward", "time", "s", OK, B=self.B, L=self.S, M=self.M)
        return [_filled(replace(row, impl=name, T=t, note=f"{e:.1e}"), samples) for name, (t, e) in needed.items()]


def error_of(l: Tensor, g: Tensor) -> float:
    """Σ_j |Σ_s P_sj − 1/M| of the plan of g [B, M], rows of mass 1/S."""
    plan = (l.double() + g.double().unsqueeze(-2)).softmax(-1) / l.shape[-2]
    return float((plan.sum(-2) - 1 / l.shape[-1]).abs().sum(-1).max())


def newton_passes(l: Tensor) -> tuple[int, float]:
    """How many, and the error after them; at most `MOST`."""
    passes, error = 1, math.inf
    while error > ERROR and passes < MOST["newton"]:
        passes += 1
        error = error_of(l, sinkhorn(l, num_iters=passes, **NEWTON)[1])
    return passes, error


def sinkhorn_passes(l: Tensor) -> tuple[int, float]:
    """Likewise, an iteration a time."""
    g, passes, error = None, 0, math.inf
    while error > ERROR and passes < MOST["sinkhorn"]:
        passes += 1
        g = sinkhorn(l, num_iters=1, initial_potential=g)[1]
        error = error_of(l, g)
    return passes, error


def call(l: Tensor, name: str, passes: int) -> Callable[[], object]:
    """What one timed call does."""

    def forward() -> object:
        with torch.no_grad():
            return sinkhorn(l, num_iters=passes, **HOW[name])

    return forward


def _filled(row: Row, samples: dict[str, list[float]]) -> Row:
    q25, median, q75 = quartiles(samples[row.impl])
    low, ratio, high = paired_ratio(samples[row.impl], samples["newton"])
    times = {"q25": q25, "median": median, "q75": q75}
    return replace(row, runs=len(samples[row.impl]), ratio=ratio, ratio_q25=low, ratio_q75=high, **times)


def cases(quick: bool) -> Iterator[Case]:
    for data in ("random D = 64", "random D = 16", "random D = 3", "clusters D = 64"):
        for epsilon in EPSILONS:
            yield Case(data, epsilon, S=256, M=8) if quick else Case(data, epsilon)


def table(rows: Sequence[Row]) -> str:
    """Passes and milliseconds of each implementation, as markdown."""
    lines = [f"| tokens | {' | '.join(f'{name}: passes, ms' for name in HOW)} |", "|---" * (1 + len(HOW)) + "|"]
    for name in dict.fromkeys(row.case for row in rows):
        found = {row.impl: f"{row.T}, {1e3 * row.median:.1f} (error {row.note})" for row in rows if row.case == name}
        lines.append(f"| {' | '.join([name.removeprefix('converged, '), *(found[impl] for impl in HOW)])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    arguments = entry_point.measure_or_table("benchmarks.cpu.converged", __doc__, argv)
    if arguments.command == "table":
        print(table(read_csv(arguments.csv)[0]))
        return 0
    torch.set_num_threads(arguments.threads)
    on, rows = stamp(arguments.threads, "cpu"), []
    path = arguments.out / f"converged_{on.date}.csv"
    for case in cases(arguments.quick):
        rows += case.rows(0.05 if arguments.quick else 1.0)
        write_csv(path, rows, on)
    print(f"{table(rows)}\n\n{path}")
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.cpu.converged", main)
