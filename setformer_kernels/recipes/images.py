"""Images from disk, and augmentation that depends on nothing but seed, epoch and index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .errors import RecipeError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as everywhere


def read_image(path: Path) -> Image.Image:
    """The image as RGB."""
    return _read(path, _as_rgb)


def read_mask(path: Path) -> Image.Image:
    """The image in its own mode."""
    return _read(path, lambda image: image)


def _read(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ValueError(f"{image.width} × {image.height} pixels are more than Pillow's limit of {limit}")
            image.load()
            return convert(image)
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist") from error
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise RecipeError(f"{path} is not an image that can be read: {str(error) or type(error).__name__}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel; what is transparent shows the colour below."""
    if image.mode.startswith("I"):  # 16 bits, or 32 that may hold 16: Pillow would cut at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 1 << 16:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


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
