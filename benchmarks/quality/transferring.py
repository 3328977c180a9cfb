"""What the benchmarks of attention transfer share: their options, the rows of a conversion, and a file of many runs."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.hardware import ROOT
from benchmarks.common.results import Stamp, stamp

Row = tuple[Any, ...]  # the setting's cells, moment, name, value
Setting = Mapping[str, Any]  # what names a run, a column each
LAST = ("moment", "name", "value")
LETTERS = {"references": "M", "iterations": "T"}


def add_options(found: argparse.ArgumentParser, name: str) -> None:
    """Options of a transfer, of what runs before and after it, and of the results called name."""
    found.add_argument("--references", type=int, default=64)
    found.add_argument("--iterations", type=int, default=1)
    found.add_argument("--seed", type=int, default=0, help="of the references and of the order of the samples")
    found.add_argument("--original", action="store_true", help="the encoder's own accuracies instead of a transfer")
    found.add_argument("--steps", type=int, default=300, help="of stage 1")
    found.add_argument("--tune-steps", type=int, default=200, help="of stage 2")
    found.add_argument("--learning-rate", type=float, default=3e-3)
    found.add_argument("--tune-learning-rate", type=float, default=2e-3)
    found.add_argument("--batch-size", type=int, default=32)
    found.add_argument("--curve", action="store_true", help="the error of 1, 2, ... converted layers too")
    found.add_argument("--work", type=Path, default=ROOT / "build" / name, help="folder of checkpoints")
    found.add_argument("--recording", type=Path, help="folder of the original's answers, made where it is missing")
    found.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    found.add_argument("--name", help=f"OUT/NAME.csv and .json (default: {name} and date)")
    found.add_argument("--threads", type=int, default=1)


def setting_of(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What names a run; the original has none of it."""
    return {name: "" if args.original else getattr(args, name) for name in names}


def transferred(
    teacher: nn.Module, args: argparse.Namespace, setting: Setting, train: Any, held_out: Any, collate: Any,
    measured: int, **own: Any,
) -> tuple[nn.Module, list[Row], str]:  # fmt: skip
    """A conversion of the teacher, resumed where it was begun, what its report says, and the moment it is of.

    Args:
        measured: held-out samples that errors are measured on.
        own: keyword arguments of SeT attention beyond references, iterations and a learned ε.
    """
    from setformer_kernels.convert import Schedule, Transfer, transfer_attention

    folder = args.work / "_".join(f"{LETTERS.get(name, name)}{value}" for name, value in setting.items())
    shared = {"batch_size": args.batch_size, "save_every": 50, "cpu": True, "seed": args.seed}
    match = Schedule(args.steps, args.learning_rate, **shared)
    tune = Schedule(args.tune_steps, args.tune_learning_rate, **shared)
    how = Transfer(match, tune, curve=args.curve, measured_on=measured // args.batch_size)
    own = {"num_references": args.references, "num_iters": args.iterations, "learn_epsilon": True, **own}
    told = {"resume": folder.exists(), "recording": args.recording}
    model, report = transfer_attention(teacher, train, held_out, collate, folder, how, **told, **own)
    print(report)
    return model, [(*setting.values(), *row) for row in rows_of(report)], report.returned


def rows_of(report: Any) -> list[Row]:
    """(moment, name, value): agreement of the outputs, the error of every head, the curve."""
    rows = [(moment, *pair) for moment, values in report.outputs.items() for pair in values.items()]
    for moment, errors in report.layers.items():
        rows += [(moment, f"error of {e.layer}, head {e.head}", e.error) for e in errors]
    return rows + [("curve", f"{i} layers, with {s.layer}", s.error) for i, s in enumerate(report.curve, 1)]


def run(
    name: str, args: argparse.Namespace, named_by: Sequence[str],
    measure: Callable[[argparse.Namespace], tuple[Iterable[Row], Mapping[str, Any]]],
) -> int:  # fmt: skip
    """Measures, and writes what was found with the stamp of the tree as it was before."""
    torch.set_num_threads(args.threads)
    mark = stamp(args.threads, "cpu")
    rows, conditions = measure(args)
    print(f"written: {write(name, args, setting_of(args, named_by), rows, mark, conditions)}")
    return 0


def write(
    name: str, args: argparse.Namespace, setting: Setting, rows: Iterable[Row], mark: Stamp,
    conditions: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Puts a run's rows in place of those that OUT/NAME.csv has of it, and its conditions in the JSON beside it."""
    cells = [[*row[:-1], f"{row[-1]:.6g}"] for row in rows]
    path: Path = args.out / f"{args.name or f'{name}_{mark.date}'}.csv"
    old = list(csv.reader(path.read_text().splitlines()))[1:] if path.is_file() else []
    kept = [row for row in old if row[: len(setting)] != [str(cell) for cell in setting.values()]]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([[*setting, *LAST], *kept, *cells])
    runs = json.loads(path.with_suffix(".json").read_text()) if path.with_suffix(".json").is_file() else {}
    run = ", ".join(f"{LETTERS.get(column, column)} {value}" for column, value in setting.items())
    runs["original" if args.original else run] = {**asdict(mark), **conditions, **_options(args)}
    path.with_suffix(".json").write_text(json.dumps(runs, indent=2) + "\n")
    return path


def _options(args: argparse.Namespace) -> dict[str, str]:
    """As they were given, without the folders of one machine."""
    paths = [name for name, value in vars(args).items() if isinstance(value, (Path, list)) or name == "recording"]
    options = {name: str(value) for name, value in vars(args).items() if name not in paths}
    return options | {"recorded": str(args.recording is not None)}
