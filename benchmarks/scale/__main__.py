"""`python -m benchmarks.scale run`: one sequence over simulated ranks on this machine; `equal`: whether they are one
rank; `model`: a model of networks."""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import entry_point
from benchmarks.common.hardware import CHILD_ENV, ROOT, default_threads
from benchmarks.common.results import stamp
from benchmarks.scale import costs, equality, streamed

RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", help="measure on this machine's processors (the default)")
    equal = commands.add_parser("equal", help="compare ranks with one; 6 GiB of memory a million tokens")
    for command, tokens in ((run, 2**24), (equal, 2**20)):
        command.add_argument("--tokens", type=int, default=tokens)
        command.add_argument("--ranks", type=int, default=8)
        command.add_argument("--threads", type=int, default=default_threads())
        command.add_argument("--out", type=Path, help="CSV to append a row to")
    model = commands.add_parser("model", help="write the table of predicted costs")
    model.add_argument("--out", type=Path, default=RESULTS / "scale_model.md")
    return parser


def resident() -> int:
    """Bytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(plan: streamed.Plan, threads: int) -> dict[str, float]:
    """One forward and backward over all ranks."""
    torch.set_num_threads(threads)
    streamed.run(plan._replace(tokens=plan.ranks * 256))  # thread pools, imports
    before, begin, used = resident(), time.perf_counter(), time.process_time()
    found, sent = streamed.run(plan)
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    shard = 4 * plan.rows * plan.heads * plan.width * 4  # q, k, v, o of one rank
    incoming = torch.stack([one.cotangent_sum for one in found]).sum(0)
    outgoing = torch.stack([one.value_sum for one in found]).sum(0)
    size = torch.stack([one.cotangent_sum.abs() for one in found]).sum()
    half = len(sent) // 2
    return {
        "tokens": plan.tokens, "ranks": plan.ranks, "seconds": seconds, "cpu_seconds": used,
        "load": os.getloadavg()[0], "sent_forward": sum(sent[:half]),
        "sent_backward": sum(sent[half:]), "peak_gib": resident() / GIB,
        "beyond_shard_gib": (resident() - before - shard) / GIB,
        "rows_error": max(one.rows_sum for one in found),
        "columns_error": ((outgoing - incoming).abs().sum() / size).item(),
    }  # fmt: skip


def compare(plan: streamed.Plan, threads: int) -> dict[str, float]:
    """Of the error budget of each result, what ranks used."""
    torch.set_num_threads(threads)
    used = equality.budget_used(plan)
    return {"tokens": plan.tokens, "ranks": plan.ranks, **{f"of_{name}": share for name, share in used.items()}}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(entry_point.words(argv, "run"))
    if arguments.command == "model":
        text = costs.rendered(costs.table(RESULTS))
        arguments.out.write_text(text)
        print(text)
        return 0
    if any(name not in os.environ for name in CHILD_ENV):
        words = [sys.executable, "-m", "benchmarks.scale", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(words, cwd=ROOT, env=os.environ | CHILD_ENV, check=False).returncode
    plan = streamed.Plan(arguments.tokens, arguments.ranks)
    row = (compare if arguments.command == "equal" else measure)(plan, arguments.threads)
    for name, value in row.items():
        print(f"{name:>18} {value:.6g}")
    if arguments.out is not None:
        append(arguments.out, row, arguments.threads)
    return int(arguments.command == "equal" and max(row[name] for name in row if name.startswith("of_")) > 1)


def append(path: Path, row: dict[str, float], threads: int) -> None:
    cells = {**{k: f"{v:.6g}" for k, v in row.items()}, **asdict(stamp(threads, "cpu"))}
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, cells)
        if fresh:
            writer.writeheader()
        writer.writerow(cells)


if __name__ == "__main__":
    entry_point.run("benchmarks.scale", main)
