"""`python -m benchmarks.quality [run] [options]`: train what has no row yet; `table CSV`: print the table of a file."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT
from benchmarks.common.results import stamp
from benchmarks.quality import language, results, table, train
from benchmarks.quality.plot import draw
from benchmarks.quality.results import Setting
from benchmarks.quality.tasks import TASKS

SEEDS = 3
QUICK = tuple(variant for variant in train.VARIANTS if variant.name in ("softmax", "SeT, T = 3", "SeT, RKHS values"))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = found.add_subparsers(dest="command")
    run = commands.add_parser("run", help="train and score everything (the default)")
    run.add_argument("--quick", action="store_true", help="every code path in seconds; the scores mean nothing")
    run.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    run.add_argument("--name", help="file name without ending (default: quality and date)")
    run.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    run.add_argument(
        "--task",
        choices=[*(task.name for task in TASKS), *language.BY_NAME],
        action="append",
        help="only this (repeatable); the language models, lm and lm1024, run where they are named",
    )
    run.add_argument(
        "--variant", choices=[one.name for one in (*train.VARIANTS, *train.TO_THE_END, *language.VARIANTS)],
        action="append", metavar="NAME",
        help="only this attention, by its name in the table (repeatable)",
    )  # fmt: skip
    run.add_argument("--seeds", type=int, default=SEEDS, help=f"how many seeds, from 0 (default: {SEEDS})")
    shown = commands.add_parser("table", help="print the table of a results file")
    shown.add_argument("csv", type=Path)
    return found


def plan(
    quick: bool, names: Sequence[str] | None = None, only: Sequence[str] | None = None, seeds: int = SEEDS
) -> list[Setting]:
    """Every run of the tasks and variants with these names (None: all), in the order in which they are made: variant
    by variant."""
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    known = train.VARIANTS + train.TO_THE_END if only else QUICK if quick else train.VARIANTS
    variants = [variant for variant in known if not only or variant.name in only]
    tasks = [task for task in TASKS if not names or task.name in names]
    own = [variant for variant in language.VARIANTS if not only or variant.name in only]
    named = [language.BY_NAME[name] for name in names or () if name in language.BY_NAME]
    models = [
        Setting(task, variant, language.quick(task.budget) if quick else task.budget, seed)
        for variant, task, seed in itertools.product(own, named, range(1 if quick else seeds))
    ]
    return models + [
        Setting(task, variant, task.budget.quick() if quick else task.budget, seed)
        for variant, task, seed in itertools.product(variants, tasks, range(1 if quick else seeds))
    ]


def run(arguments: argparse.Namespace) -> None:
    """Make the runs that have no row, draw the plot, print the table."""
    torch.set_num_threads(arguments.threads)
    on = stamp(arguments.threads, "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name or f'quality_{on.date}'}.csv"
    rows = results.read(path)
    left = results.missing(plan(arguments.quick, arguments.task, arguments.variant, arguments.seeds), rows)
    for i, one in enumerate(left):
        how = language.run if one.task.name in language.BY_NAME else train.run
        found = how(one.task, one.variant, one.seed, one.budget)
        rows.append(results.row(one, found, on))
        results.write(path, rows)
        what = f"{one.task.name}, {one.variant.name}, seed {one.seed}"
        print(f"{i + 1}/{len(left)} {what}: {one.task.metric} {found.score:.3f}", flush=True)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(rows, path.with_suffix(".png"))
    print(f"\n{table.render(rows)}\n\n{path}: {len(rows)} rows")


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(entry_point.words(argv, "run"))
    try:
        if arguments.command == "table":
            if not (rows := results.read(arguments.csv)):
                raise ValueError(f"{arguments.csv} holds no results")
            print(table.render(rows))
        else:
            run(arguments)
    except (ValueError, OSError) as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.quality", main)
