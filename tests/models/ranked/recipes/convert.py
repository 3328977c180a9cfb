"""A conversion on two ranks, in a folder with a model and texts: a case of tests/models/test_ranks_convert.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipe_helpers import recipe
from test_ranks_convert import ON_TWO, RUN


def case_conversion() -> None:
    recipe(*RUN, *ON_TWO, "--output", "two")
    dist.barrier()
