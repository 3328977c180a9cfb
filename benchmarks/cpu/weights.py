"""Whole modules that return their weights, `need_weights=True`: `python -m benchmarks.cpu.weights [table CSV]`.

SeTAttention at T = 1 against nn.MultiheadAttention of the same sizes, float32 and bfloat16, weights averaged over heads
and per head.  A backward gets a gradient of the output alone, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.common import entry_point
from benchmarks.common.cases import BOTH, FORWARD, MODES
from benchmarks.common.measure import interleave, paired_ratio, quartiles
from benchmarks.common.results import OK, Row, read_csv, stamp, write_csv
from setformer_kernels import SeTAttention
from setformer_kernels.testing import ALL_CASES, measure

SET, SOFTMAX = "set", "mha"
AVERAGED, PER_HEAD = "weights averaged", "weights per head"
DTYPES = (torch.float32, torch.bfloat16)
T = 1


@dataclass(frozen=True)
class Case:
    """One size at which both modules are timed, in interleaved rounds."""

    L: int
    B: int
    H: int
    dtype: torch.dtype
    mode: str
    what: str
    D: int = 64
    M: int = 64

    @property
    def arguments(self) -> dict[str, bool]:
        """What a call is given beside the tokens."""
        return {"average_attn_weights": self.what == AVERAGED}

    def modules(self) -> dict[str, nn.MultiheadAttention]:
        embed, common = self.H * self.D, {"batch_first": True, "dtype": self.dtype}
        return {
            SET: SeTAttention(embed, self.H, num_references=self.M, num_iters=T, **common),
            SOFTMAX: nn.MultiheadAttention(embed, self.H, **common),
        }

    def row(self, name: str) -> Row:
        """Of one of the modules, without times."""
        return Row(self.what, name, self.mode, "time", "s", OK, T=T if name == SET else None, B=self.B, H=self.H,
                   L=self.L, M=self.M, D=self.D, dtype=str(self.dtype).removeprefix("torch."))  # fmt: skip

    def call(self, module: nn.MultiheadAttention) -> Callable[[], object]:
        """What one timed call of the module does."""
        module.train(self.mode == BOTH)
        generator = torch.Generator().manual_seed(self.L)
        shape = (self.B, self.L, self.H * self.D)
        x, grad = (torch.randn(shape, generator=generator).to(self.dtype) for _ in range(2))
        arguments = self.arguments

        def forward() -> object:
            with torch.no_grad():
                return module(x, x, x, **arguments)

        def both() -> object:
            y = x.detach().requires_grad_()
            output = module(y, y, y, **arguments)[0]
            return torch.autograd.grad(output, [y, *module.parameters()], grad)

        return forward if self.mode == FORWARD else both

    def rows(self, budget_s: float) -> list[Row]:
        """Both modules' times; `ratio` is softmax attention's over SeT's."""
        samples = interleave({name: self.call(module) for name, module in self.modules().items()}, budget_s)
        return [filled(self.row(name), samples, name) for name in samples]


def filled(row: Row, samples: dict[str, list[float]], name: str) -> Row:
    """The row with an implementation's times, and their ratio to SeT's round by round."""
    q25, median, q75 = quartiles(samples[name])
    low, ratio, high = paired_ratio(samples[name], samples[SET])
    times = {"q25": q25, "median": median, "q75": q75}
    return replace(row, runs=len(samples[name]), ratio=ratio, ratio_q25=low, ratio_q75=high, **times)


def cases(quick: bool) -> Iterator[Case]:
    """E = 512 with 8 heads at batch 1, E = 384 with 6 heads at batch 8."""
    for dtype in DTYPES:
        for what in (AVERAGED, PER_HEAD):
            for mode in MODES:
                for B, H, lengths in ((1, 8, (64, 128, 256, 512, 1024)), (8, 6, (64, 128, 256, 512))):
                    yield from (Case(L, B, H, dtype, mode, what) for L in (lengths[:1] if quick else lengths))


def table(rows: Sequence[Row]) -> str:
    """SeT's time over softmax attention's, medians over the rounds with quartiles, as markdown."""
    lines = ["| weights | dtype | mode | B | E | L | SeT / softmax |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.impl == SOFTMAX:
            cells = [row.case.removeprefix("weights "), row.dtype, row.mode, row.B, (row.H or 0) * (row.D or 0), row.L]
            ratio = f"{1 / row.ratio:.2f} ({1 / row.ratio_q75:.2f}–{1 / row.ratio_q25:.2f})"
            lines.append(f"| {' | '.join(map(str, [*cells, ratio]))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    arguments = entry_point.measure_or_table("benchmarks.cpu.weights", __doc__, argv)
    if arguments.command == "table":
        print(table(read_csv(arguments.csv)[0]))
        return 0
    torch.set_num_threads(arguments.threads)
    for dtype in DTYPES:
        measure.weights(ALL_CASES["length_63"], dtype, "auto").check("set_attention_weights")
    on, rows = stamp(arguments.threads, "cpu"), []
    path = arguments.out / f"weights_{on.date}.csv"
    for case in cases(arguments.quick):
        rows += case.rows(0.05 if arguments.quick else 2.0)
        write_csv(path, rows, on)
    print(f"{table(rows)}\n\n{path}")
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.cpu.weights", main)
