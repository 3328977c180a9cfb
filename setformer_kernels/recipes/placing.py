"""References on the k-means centres of a few samples' tokens, before training starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from torch.utils.data import Dataset


def place_references(samples: Dataset, few: int, place: Callable[[list[Any]], list[str]]) -> None:
    """Calls `place`, which returns the names of the layers whose tokens are fewer than their references, with `few`
    samples from all over the data set; where there are such layers, with twice as many, until all samples are taken.

    Layers that are left keep the random references that they have, and a warning says so.
    """
    size = len(samples)  # type: ignore[arg-type]
    count = min(few, size)
    while True:
        rows = [samples[i] for i in range(0, size, size // count)][:count]
        left = place(rows)
        if not left or count == size:
            break
        count = min(2 * count, size)
    if left and PartialState().is_main_process:
        print(
            f"warning: the references of {', '.join(left)} start at random: all {size} training samples together have"
            " fewer tokens there than references",
            file=sys.stderr,
        )
