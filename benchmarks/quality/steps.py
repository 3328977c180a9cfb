"""`python -m benchmarks.quality.steps`: milliseconds of a training step on one sequence (forward, backward, clipping,
AdamW) of the same decoder with SeT and with softmax attention, at many lengths, and from which on SeT's is shorter.

SeT has its gates and convolutions, softmax its rotary positions.  What the tokens are does not change the time of a
step, so they are random; both models take their steps in turns.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.common import entry_point, markdown
from benchmarks.common.hardware import ROOT, default_threads
from benchmarks.common.results import Stamp, stamp
from benchmarks.quality.language import Mixing, Rows
from benchmarks.quality.results import since, write_stamped
from benchmarks.tasks.training import Trainer
from setformer_kernels.models import CausalLM

LENGTHS = (512, 2048, 8192, 16384)
ROUNDS, LEAST = 9, 3  # interleaved, after one that warms up; fewer where a length takes longer than --seconds
RATE = 1e-3
MIXINGS = {"softmax": Mixing("softmax"), "set": Mixing("set", gate=True, conv=True)}


@dataclass(frozen=True)
class Row:
    attention: str
    length: int
    step_ms: float  # the median of the rounds
    step_q25: float
    step_q75: float
    ratio: float  # this step over SeT's in the same round, the median
    rounds: int
    width: int
    heads: int
    depth: int


def training(kind: str, length: int, width: int, heads: int, depth: int) -> Trainer:
    """Of the decoder, with one sequence of `length` tokens a step."""
    torch.manual_seed(0)
    model = Rows(CausalLM(MIXINGS[kind].decoder(width, heads, depth)))
    tokens = torch.randint(256, (1, length + 1))
    return Trainer(model, lambda: (tokens[:, :-1], tokens[0, 1:]), label_smoothing=0.0)


def measure(length: int, sizes: tuple[int, int, int], seconds: float) -> list[Row]:
    """sizes: width, heads, depth."""
    trainers = {kind: training(kind, length, *sizes) for kind in MIXINGS}
    times: dict[str, list[float]] = {kind: [] for kind in trainers}
    for trainer in trainers.values():
        trainer.step(RATE)
    start = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= LEAST and time.perf_counter() - start > seconds:
            break
        for kind, trainer in trainers.items():
            times[kind].append(1e3 * trainer.step(RATE)[1])
    rows = []
    for kind, found in times.items():
        q25, _, q75 = quantiles(found, n=4, method="inclusive")
        ratio = median(one / own for one, own in zip(found, times["set"], strict=True))
        rows.append(Row(kind, length, median(found), q25, q75, ratio, len(found), *sizes))
    return rows


def wins(rows: list[Row]) -> int | None:
    """The shortest length from which on a step with SeT takes less."""
    return since({row.length: row.ratio > 1 for row in rows if row.attention != "set"})


def render(rows: list[Row], on: Stamp) -> str:
    """A table for a page, and which length SeT wins from."""
    by = {(row.attention, row.length): row for row in rows}
    head = ["length", "softmax, ms", "SeT, ms", "softmax/SeT"]
    body = []
    for length in sorted({row.length for row in rows}):
        pair = by["softmax", length], by["set", length]
        shown = [f"{row.step_ms:.4g} ({row.step_q25:.4g} to {row.step_q75:.4g})" for row in pair]
        body.append([str(length), *shown, f"{pair[0].ratio:.2f}"])
    won = wins(rows)
    reached = "at none of these lengths" if won is None else f"from {won} tokens on"
    what = markdown.where(on.cpu, on.threads, on.torch, on.commit, on.date)
    return "\n".join([*markdown.table(head, body), "", f"A step with SeT takes less {reached}. {what}."])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.steps", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument(
        "--seconds", type=float, default=40.0, help=f"of a length, from {LEAST} rounds on (default: 40)"
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--threads", type=int, default=default_threads(), help="torch threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="CSV (default: steps and date in benchmarks/results)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    on = stamp(arguments.threads, "cpu")
    sizes = (arguments.width, arguments.heads, arguments.depth)
    rows = [row for length in arguments.lengths for row in measure(length, sizes, arguments.seconds)]
    path = arguments.out or ROOT / "benchmarks" / "results" / f"steps_{on.date}.csv"
    write_stamped(path, rows, on)
    print(f"{render(rows, on)}\n\n{path}")
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.quality.steps", main)
