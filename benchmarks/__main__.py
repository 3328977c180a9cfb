"""`python -m benchmarks [run] [options]`, `python -m benchmarks table CSV`, `python -m benchmarks plot CSV`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import entry_point
from benchmarks.common.cases import MASKS, PACKED, full_plan, quick_plan
from benchmarks.common.correctness import Wrong, check
from benchmarks.common.hardware import ROOT, default_threads, environment
from benchmarks.common.measure import CLOCKS
from benchmarks.common.results import Row, read_csv, stamp, write_csv
from benchmarks.cpu.plot import draw
from benchmarks.cpu.runner import Run
from benchmarks.cpu.table import render

ONLY = ("probes", "headline", "sweep", *MASKS, PACKED, "sinkhorn", "memory")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", help="measure everything (the default)")
    run.add_argument("--quick", action="store_true", help="every code path in seconds; the numbers mean little")
    run.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    run.add_argument("--name", help="file name without ending (default: device and date)")
    run.add_argument("--threads", type=int, default=default_threads(), help="torch threads (default: all cores)")
    run.add_argument("--device", choices=sorted(CLOCKS), default="cpu")
    run.add_argument("--only", choices=ONLY, default="", help="one part of the run (correctness always comes first)")
    for name, text in (("table", "print the targets and what was measured"), ("plot", "draw speed against length")):
        command = commands.add_parser(name, help=text)
        command.add_argument("csv", type=Path)
        if name == "plot":
            command.add_argument("--out", type=Path, help="file to write (default: beside the CSV, .png)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Check, measure, write the CSV, the environment and the plot, print the table."""
    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    plan = quick_plan() if arguments.quick else full_plan()
    about = environment(arguments.threads)
    about["correctness"] = check(plan, log=print)
    on = stamp(arguments.threads, arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name or f'{arguments.device}_{on.date}'}.csv"
    rows: list[Row] = []
    for group in Run(plan, arguments.threads, arguments.device, arguments.only).rows():
        rows += group
        write_csv(path, rows, on)
    about["seconds"] = round(time.perf_counter() - start, 1)
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    plot(path, path.with_suffix(".png"))
    table(path)
    print(f"\n{path}: {len(rows)} rows in {about['seconds']} s")


def plot(csv: Path, out: Path) -> None:
    """Draw a results file, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    rows, stamp = read_csv(csv)
    draw(rows, dict(stamp), out)
    print(f"plot: {out}")


def table(csv: Path) -> None:
    """Print the targets and what a results file says about them."""
    print("\n" + render(*read_csv(csv)))


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 when a result is wrong."""
    arguments = _parser().parse_args(entry_point.words(argv, "run"))
    try:
        if arguments.command == "table":
            table(arguments.csv)
        elif arguments.command == "plot":
            plot(arguments.csv, arguments.out or arguments.csv.with_suffix(".png"))
        else:
            run(arguments)
    except (Wrong, ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks", main)
