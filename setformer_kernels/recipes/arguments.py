"""Options that every recipe has, and the ranges that numbers among the options must be in."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from .errors import RecipeError


def add_training_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Options that every recipe has."""
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, curve and results")
    parser.add_argument("--epochs", type=float, default=defaults["epochs"])
    parser.add_argument("--batch-size", type=int, default=defaults["batch_size"], help="per device")
    parser.add_argument("--learning-rate", type=float, default=defaults["learning_rate"])
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--accumulate", type=int, default=1, help="batches an optimizer step")
    parser.add_argument("--precision", choices=["float32", "bf16", "fp16"], default="float32", help="mixed precision")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a second forward pass")
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; 0: once an epoch")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data, per device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in --output")
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help="only evaluate this saved model")


def check_training_arguments(args: argparse.Namespace) -> None:
    """RecipeError for the first of these options that cannot be."""
    for name in ("batch_size", "accumulate"):
        check_range(args, name, 1)
    for name in ("learning_rate", "weight_decay", "save_every", "workers"):
        check_range(args, name, 0)
    check_range(args, "epochs", 0, open_low=True)
    check_range(args, "warmup", 0, 0.99)
    check_range(args, "seed", 0, 2**32 - 1)
    there = next(path for path in (args.output, *args.output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RecipeError(f"--output must be a folder, got {args.output}: {there} is a file")


def check_range(
    args: argparse.Namespace, name: str, low: float, high: float = math.inf, open_low: bool = False
) -> None:  # fmt: skip
    """args.name is a number from low (with `open_low`, above it) to high; RecipeError otherwise."""
    value = getattr(args, name)
    if low <= value <= high and value < math.inf and not (open_low and value == low):
        return  # which a NaN does not
    wants = f"from {low} to {high}" if high < math.inf else f"{'>' if open_low else '≥'} {low}"
    raise RecipeError(f"--{name.replace('_', '-')} must be {wants}, got {value}")
