"""A language model on four ranks, two of which share each window.  Cases of tests/models/test_ranks.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipe_helpers import recipe
from test_ranks import RUNS, evaluation

SHARED = ["--context-parallel", 2]


def case_training() -> None:
    recipe(*RUNS["shared"], "--batch-size", 4, *SHARED, "--output", "four/shared")


def case_evaluation_in_batches_that_are_filled_up() -> None:
    recipe(*evaluation("shared"), *SHARED, "--output", "four/evaluated")
    dist.barrier()
