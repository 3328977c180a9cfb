"""A segmentation task drawn by code: one to three shapes of random size, place, turn and contrast on noise.

The classes are shapes, not textures: every shape has one random brightness, so that what a pixel belongs to shows only
in the outline around it. Later shapes cover earlier ones.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

CLASSES = ("background", "disc", "bar", "cross", "ring")
SIDE = 24  # pixels along an edge
NOISE = 0.1
FEWEST, MOST = 1, 3
SMALLEST, LARGEST = 4.0, 7.0  # outer radius in pixels
THICKNESS, HOLE = 0.35, 0.55  # half the width of a bar, the inner radius of a ring; of the outer radius
PIXEL_X, PIXEL_Y = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)  # [SIDE, SIDE] each


def inside(kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points (x, y), in units of the outer radius from the centre, belong to a shape of class `kind`."""
    name, radius = CLASSES[kind], np.hypot(x, y)
    if name in ("bar", "cross"):
        bar = (abs(x) <= 1) & (abs(y) <= THICKNESS)
        return bar if name == "bar" else bar | ((abs(y) <= 1) & (abs(x) <= THICKNESS))
    return (radius <= 1) & (radius >= (HOLE if name == "ring" else 0.0))


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image and the class of each of its pixels: [SIDE, SIDE] both."""
    image, labels = rng.normal(0.0, NOISE, (SIDE, SIDE)), np.zeros((SIDE, SIDE), dtype=np.int64)
    for _ in range(rng.integers(FEWEST, MOST + 1)):
        kind, size, turn = rng.integers(1, len(CLASSES)), rng.uniform(SMALLEST, LARGEST), rng.uniform(0, 2 * math.pi)
        left, top = rng.uniform(0.5 * size, SIDE - 0.5 * size, 2)
        x, y = (PIXEL_X - left) / size, (PIXEL_Y - top) / size
        covered = inside(kind, x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn))
        level = rng.uniform(0.5, 1.5)
        image[covered] = level + rng.normal(0.0, NOISE, covered.sum())
        labels[covered] = kind
    return image, labels


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` images [N, SIDE, SIDE] and the classes of their pixels, int64 of the same shape."""
    rng = np.random.default_rng(seed)
    images, labels = zip(*(draw(rng) for _ in range(count)), strict=True)
    return torch.from_numpy(np.stack(images)).float(), torch.from_numpy(np.stack(labels))


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Intersection over union of each class over all pixels, averaged over the classes that occur in either."""
    pairs = torch.bincount(labels.flatten() * len(CLASSES) + predicted.flatten(), minlength=len(CLASSES) ** 2)
    confusion = pairs.view(len(CLASSES), len(CLASSES)).double()  # [true, predicted]
    both, either = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return (both[either > 0] / either[either > 0]).mean().item()
