"""The four tasks: what a model reads, what it answers, and the budget that every attention gets.

Budgets were chosen with softmax attention alone. Data and splits are the same for every seed; a seed draws the initial
weights and the training batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.model import Encoder
from benchmarks.tasks import digits, listops, shapes, sources, text
from benchmarks.tasks.encoder import Attention
from benchmarks.tasks.training import Batch

WIDTH = text.WIDTH  # of its byte embedding
HEADS, DEPTH = 2, 2
DATA_SEED = 0
PATCH = 3  # pixels along a patch's edge in the segmentation task
TEXT_LENGTH, TEXT_TESTS = 256, 1000


@dataclass(frozen=True)
class Budget:
    """What training gets, and how many samples there are; `quick` is for the tests."""

    steps: int
    batch: int
    learning_rate: float
    train: int = 0  # samples to train on and to test on, where they are generated
    test: int = 0

    def quick(self) -> Budget:
        return Budget(4, 8, self.learning_rate, min(self.train, 64), min(self.test, 32))


@dataclass(frozen=True)
class Data:
    """`sample(batch, rng)` draws a training batch; `tokens` and `labels` are the test."""

    sample: Callable[[int, np.random.Generator], Batch]
    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """`data(budget)`, `build(attention)` and `score(predicted, labels)`, all of them the same for every attention."""

    name: str
    title: str
    metric: str
    budget: Budget
    data: Callable[[Budget], Data]
    build: Callable[[Attention], Encoder]
    score: Callable[[Tensor, Tensor], float]


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    return (predicted == labels).double().mean().item()


def grid(*sides: int) -> Tensor:
    """Cell centres of a grid in the unit cube, row by row: [L,P]."""
    axes = [(torch.arange(side) + 0.5) / side for side in sides]
    return torch.cartesian_prod(*axes).view(-1, len(sides))


def encoder(
    attention: Attention, *, embed: Callable[[], nn.Module], head: Callable[[], nn.Module], position: Tensor,
    pooled: bool = True, pad: int | None = None,
) -> Encoder:  # fmt: skip
    """The encoder of every task."""
    return Encoder(embed(), head(), position, attention, width=WIDTH, heads=HEADS, depth=DEPTH, pooled=pooled, pad=pad)


def rows_of(tokens: Tensor, labels: Tensor) -> Callable[[int, np.random.Generator], Batch]:
    """Draws rows of a training set, with replacement."""

    def sample(batch: int, rng: np.random.Generator) -> Batch:
        rows = torch.from_numpy(rng.integers(len(tokens), size=batch))
        return tokens[rows], labels[rows].flatten()

    return sample


@cache
def digit_data(budget: Budget) -> Data:
    """scikit-learn's digits [N,64,1], a token a pixel; a quarter of them is the test."""
    x, y, x_test, y_test = digits.load()
    return Data(rows_of(x, y), x_test, y_test)


@cache
def text_data(budget: Budget, length: int = TEXT_LENGTH) -> Data:
    """Windows of standard-library source [N,length], a token a byte; no file is in both splits."""
    corpus = sources.load(length=length, max_test_chunks=budget.test)
    return Data(corpus.sample, corpus.test_tokens, corpus.test_labels)


@cache
def listops_data(budget: Budget, lengths: tuple[int, int] = (listops.MIN_LENGTH, listops.MAX_LENGTH)) -> Data:
    """ListOps tokens [N, up to lengths[1]], padded to the longest of a batch."""
    found = listops.samples(budget.train + budget.test, DATA_SEED, lengths)
    train, test = found[: budget.train], found[budget.train :]
    counts = np.array([len(tokens) for tokens, _ in train])

    def sample(batch: int, rng: np.random.Generator) -> Batch:
        """Neighbours by length out of eight times as many draws, so that little of a batch is padding."""
        rows = rng.integers(len(train), size=8 * batch)
        start = rng.integers(len(rows) - batch + 1)
        rows = rows[np.argsort(counts[rows], kind="stable")][start : start + batch]
        return padded([train[row] for row in rows])

    return Data(sample, *padded(sorted(test, key=lambda one: len(one[0]))))


def padded(found: list[tuple[list[int], int]]) -> Batch:
    """Tokens [N,L] and values [N]."""
    rows = [torch.tensor(tokens) for tokens, _ in found]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=listops.PAD)
    return tokens, torch.tensor([value for _, value in found])


@cache
def shape_data(budget: Budget) -> Data:
    """Drawn images [N,24,24] and the class of each pixel."""
    images, labels = shapes.samples(budget.train + budget.test, DATA_SEED)
    train, test = slice(0, budget.train), slice(budget.train, None)
    return Data(rows_of(images[train], labels[train]), images[test], labels[test].flatten())


class Patches(nn.Module):
    """Images [B,SIDE,SIDE] -> tokens [B,L,WIDTH], L = (SIDE/PATCH)² patches row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images.unsqueeze(1)).flatten(2).mT


class Pixels(nn.Module):
    """Tokens [B,L,WIDTH] -> class logits of every pixel, image by image and row by row: [B·SIDE·SIDE, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, len(shapes.CLASSES) * PATCH**2)

    def forward(self, x: Tensor) -> Tensor:
        side = shapes.SIDE // PATCH
        patches = self.project(x).view(-1, side, side, PATCH, PATCH, len(shapes.CLASSES))
        return patches.transpose(2, 3).flatten(0, 4)


def _classes(count: int) -> Callable[[], nn.Module]:
    return partial(nn.Linear, WIDTH, count)


def text_task(name: str, length: int, budget: Budget) -> Task:
    return Task(
        name, f"bytes of the standard library, length {length}", "accuracy", budget, partial(text_data, length=length),
        partial(encoder, embed=text.ByteEmbedding, head=_classes(sources.CLASSES), position=grid(length)), accuracy,
    )  # fmt: skip


def listops_task(name: str, lengths: tuple[int, int], budget: Budget) -> Task:
    return Task(
        name, f"ListOps, lengths {lengths[0]} to {lengths[1]}", "accuracy", budget,
        partial(listops_data, lengths=lengths),
        partial(encoder, embed=partial(nn.Embedding, 1 + len(listops.VOCABULARY), WIDTH), head=_classes(10),
                position=grid(lengths[1]), pad=listops.PAD),
        accuracy,
    )  # fmt: skip


TASKS = (
    Task(
        "digits", "digits, a token a pixel, length 64", "accuracy", Budget(300, 64, 3e-3), digit_data,
        partial(encoder, embed=partial(nn.Linear, 1, WIDTH), head=_classes(10), position=grid(8, 8)), accuracy,
    ),
    text_task("text", TEXT_LENGTH, Budget(200, 16, 3e-3, test=TEXT_TESTS)),
    listops_task(
        "listops", (listops.MIN_LENGTH, listops.MAX_LENGTH), Budget(150, 32, 3e-3, train=10_000, test=1000)
    ),
    Task(
        "shapes", "segmentation of drawn shapes, length 64", "mIoU", Budget(500, 32, 3e-3, train=4000, test=300),
        shape_data,
        partial(encoder, embed=Patches, head=Pixels, position=grid(*(2 * [shapes.SIDE // PATCH])), pooled=False),
        shapes.mean_iou,
    ),
)  # fmt: skip
