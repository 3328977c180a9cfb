"""`python -m benchmarks.conversion`: the census, a folder of transformers' models at a time; what was written is kept,
and a run that was cut off goes on."""

from __future__ import annotations

import argparse
import csv
import gc
import warnings
from pathlib import Path

import torch
import transformers

from .census import folders, rows_of

FIELDS = ("folder", "model", "status", "attention", "left", "reason")
RESULTS = Path(__file__).parents[1] / "results" / "conversion.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", help="folders of transformers' models; all that are not in the table yet")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kept = _read(given.output)
    for folder in given.folders or [f for f in folders() if f not in {row["folder"] for row in kept}]:
        new = [row.cells() for row in rows_of(folder)] or [{"folder": folder, "status": "none"}]
        kept = [row for row in kept if row["folder"] != folder] + new
        _write(given.output, kept)
        gc.collect()


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["folder"]))


if __name__ == "__main__":
    main()
