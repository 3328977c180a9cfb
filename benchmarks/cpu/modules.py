"""Whole modules on short sequences: `python -m benchmarks.cpu.modules [table CSV]`.

SeTAttention at T = 1 against nn.MultiheadAttention of the same sizes, without weights, at the lengths of images and
sentences: E = 384 with 6 heads, batch 1 and 32, float32 and bfloat16; and what Python adds to a call, at width 12,
where arithmetic takes next to nothing.  A forward is one of evaluation, a backward that of training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.common import entry_point
from benchmarks.common.cases import MODES
from benchmarks.common.results import Row, read_csv, stamp, write_csv
from benchmarks.cpu import weights
from benchmarks.cpu.weights import DTYPES, SET, SOFTMAX
from setformer_kernels.testing import ALL_CASES, measure

MODULE, HOST, IMPLS = "module", "module host", (SET, SOFTMAX)
LENGTHS, BATCHES, WIDTH, HEADS = (16, 49, 64, 128, 197, 256), (1, 32), 384, 6
SMALL = 12  # the width at which a call is Python
HOST_ROUNDS, HOST_CALLS = 15, 200


class Case(weights.Case):
    """One size at which both modules are timed without weights."""

    @property
    def arguments(self) -> dict[str, bool]:
        return {"need_weights": False}


def cases(quick: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for mode in MODES:
            for batch in BATCHES:
                lengths = LENGTHS[:1] if quick else LENGTHS
                yield from (Case(L, batch, HEADS, dtype, mode, MODULE, WIDTH // HEADS) for L in lengths)


def _fastest(call: Callable[[], object], calls: int) -> float:
    """Seconds of the fastest of some calls, each timed alone: what a busy machine disturbs least."""
    found = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        call()
        found = min(found, time.perf_counter() - start)
    return found


def host(mode: str, rounds: int = HOST_ROUNDS) -> list[Row]:
    """Calls of both modules on two tokens of width SMALL; medians, over the rounds, of their fastest calls."""
    case = Case(2, 1, 2, torch.float32, mode, HOST, SMALL // 2)
    calls = {name: case.call(module) for name, module in case.modules().items()}
    samples = {name: [0.0] * rounds for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            samples[name][i] = _fastest(call, HOST_CALLS)
    return [weights.filled(case.row(name), samples, name) for name in samples]


def table(rows: Sequence[Row]) -> str:
    """SeT's time over softmax attention's, medians over the rounds, a line a length, as markdown."""
    heads = [(dtype, batch, mode) for dtype in ("float32", "bfloat16") for batch in BATCHES for mode in MODES]
    timed = {(r.dtype, r.B, r.mode, r.L): r for r in rows if (r.case, r.impl) == (MODULE, SOFTMAX)}
    lines = ["| L | " + " | ".join(f"{dtype}, batch {batch}, {mode}" for dtype, batch, mode in heads) + " |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for length in sorted({row.L for row in timed.values()}):
        cells = [timed.get((*head, length)) for head in heads]
        lines.append(f"| {length} | " + " | ".join("–" if r is None else f"{1 / r.ratio:.2f}" for r in cells) + " |")
    for mode in MODES:
        found = {row.impl: row.median for row in rows if (row.case, row.mode) == (HOST, mode)}
        if found:
            us = {name: 1e6 * seconds for name, seconds in found.items()}
            lines.append(
                f"\nA call on two tokens of width {SMALL}, {mode}: {us[SET]:.0f} µs, softmax {us[SOFTMAX]:.0f}."
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    arguments = entry_point.measure_or_table("benchmarks.cpu.modules", __doc__, argv)
    if arguments.command == "table":
        print(table(read_csv(arguments.csv)[0]))
        return 0
    torch.set_num_threads(arguments.threads)
    for dtype in DTYPES:
        measure.attention(ALL_CASES["length_63"], dtype, "auto").check("set_attention")
    on, rows = stamp(arguments.threads, "cpu"), [row for mode in MODES for row in host(mode)]
    path = arguments.out / f"modules_{on.date}.csv"
    for case in cases(arguments.quick):
        rows += case.rows(0.05 if arguments.quick else 2.0)
        write_csv(path, rows, on)
    print(f"{table(rows)}\n\n{path}")
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.cpu.modules", main)
