"""Images from disk, and augmentation that depends on nothing but seed, epoch and index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .errors import RecipeError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as everywhere


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """The image in mode; "" leaves its own."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert(mode) if mode else image
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist") from error
    except OSError as error:  # unidentified and truncated images too
        raise RecipeError(f"{path} is not an image that can be read: {error}") from error


@contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """torch's random numbers are a function of these, and go on afterwards as if nothing had been drawn.

    So a resumed run augments as the uninterrupted one did, in however many processes.
    """
    with torch.random.fork_rng(devices=[]):
        seed = 0
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
        torch.manual_seed(seed)
        yield


class Augmented(Dataset):
    """Samples whose `transform` draws its random numbers from (seed, epoch, index); Accelerate sets the epoch."""

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def load(self, index: int) -> Any:
        """What is on disk."""
        raise NotImplementedError

    def transform(self, loaded: Any) -> dict[str, Any]:
        """What the model gets."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        loaded = self.load(index)
        with drawn_from(self.seed, self.epoch, index):
            return self.transform(loaded)


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of samples whose tensors have equal shapes."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
