"""Recipes on two ranks.  Cases of tests/models/test_ranks.py, in the folder where one process has trained already."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipe_helpers import recipe
from test_ranks import ON_TWO, RUNS, evaluation


def case_training() -> None:
    for name, arguments in RUNS.items():
        recipe(*arguments, *ON_TWO, "--output", f"two/{name}")


def case_going_on_where_one_process_stopped() -> None:
    for name, arguments in RUNS.items():
        recipe(*arguments, *ON_TWO, "--output", f"from_one/{name}", "--resume")


def case_evaluation() -> None:
    for name in RUNS:
        recipe(*evaluation(name), "--output", f"evaluated/{name}")
    dist.barrier()
