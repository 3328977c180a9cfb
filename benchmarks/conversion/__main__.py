"""`python -m benchmarks.conversion`: the census, a folder of transformers' models at a time, and `timm`, its attention
classes; what was written is kept, and a run that was cut off goes on."""

from __future__ import annotations

import argparse
import csv
import gc
import warnings
from collections import Counter
from pathlib import Path

import torch

from benchmarks.common import entry_point

from . import ELSEWHERE, TIMM

FIELDS = ("folder", "model", "status", "attention", "left", "reason")
RESULTS = Path(__file__).parents[1] / "results" / "conversion.csv"


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__)
    parser.add_argument("folders", nargs="*", help="folders of transformers' models; all that are not in the table yet")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    import transformers

    from . import timm_classes
    from .census import folders, rows_of

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kept = read(given.output)
    for folder in given.folders or [f for f in folders() if f not in {row["folder"] for row in kept}]:
        found = timm_classes.rows() if folder == TIMM else rows_of(folder)
        new = [row.cells() for row in found] or [{"folder": folder, "status": "none"}]
        kept = [row for row in kept if row["folder"] != folder] + new
        _write(given.output, kept)
        gc.collect()
    print(summary(kept))
    return 0


def summary(rows: list[dict[str, str]]) -> str:
    """Of the models that could be built and run as transformers made them, how many converted; of timm's classes."""
    timm = Counter(row["status"] for row in rows if row["folder"] == TIMM)
    rows = [row for row in rows if row["folder"] != TIMM]
    of = Counter(row["status"] for row in rows)
    elsewhere = sum(row["status"] == "left" and row["reason"] == ELSEWHERE for row in rows)
    asked = of["converted"] + of["failed"] + of["left"] - elsewhere
    return (
        f"{of['converted']} of {asked} models whose attention goes through the interface run converted"
        f" ({of['converted'] / max(asked, 1):.1%}), and of {asked + elsewhere} with any attention"
        f" ({of['converted'] / max(asked + elsewhere, 1):.1%}); without attention {of['none']}, not built"
        f" {of['not built']}, not run as they are {of['not run']}; timm: {timm['converted']} of"
        f" {timm['converted'] + timm['failed'] + timm['left']} classes, not built {timm['not built']}"
    )


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["folder"]))


if __name__ == "__main__":
    entry_point.run("benchmarks.conversion", main)
