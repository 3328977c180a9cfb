"""(a) scikit-learn's handwritten digits: 8 x 8 pixels, one token a pixel, one small transformer, two attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from .models import SET, SOFTMAX, Attention, Classifier, build_pair, place_references
from .training import Batch, Run, affordable_steps, predict, time_steps, train

STEPS, BATCH, LEARNING_RATE, SEED = 400, 64, 3e-3, 0
WIDTH, HEADS, DEPTH, REFERENCES = 64, 4, 2, 16
PIXELS, PROBE_STEPS = 64, 5


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels [N,64,1] in [0,1] and labels [N], then the same for the quarter held out for the test."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16.0, labels, test_size=0.25, stratify=labels, random_state=SEED)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    return x.float().unsqueeze(-1), y.long(), x_test.float().unsqueeze(-1), y_test.long()


def build(attention: Attention) -> Classifier:
    position = 0.5 * torch.randn(PIXELS, WIDTH)  # as large as an embedded pixel: a digit is where its ink is
    return Classifier(nn.Linear(1, WIDTH), position, 10, attention, heads=HEADS, depth=DEPTH)


def prepare(name: str) -> tuple[Classifier, Callable[[], Batch]]:
    """The model with attention `name`, and its training batches: the same for every name."""
    x, y, _, _ = load()
    model = build_pair(build, name, REFERENCES, SEED)
    generator = torch.Generator().manual_seed(SEED)
    if name == SET:
        place_references(model, x[:BATCH])

    def batch() -> Batch:
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        return x[rows], y[rows]

    return model, batch


def fit(name: str, steps: int) -> tuple[Classifier, dict[str, Any]]:
    """Train the model with attention `name`; accuracy on the held-out digits."""
    model, batch = prepare(name)
    run = Run(name, steps)
    train(model, batch, run, LEARNING_RATE)
    _, _, x_test, y_test = load()
    run.accuracy = (predict(model, x_test, 256) == y_test).double().mean().item()
    return model, run.summary()


def compare(budget: float) -> tuple[Classifier, dict[str, Any]]:
    """Both models for as many steps as fit `budget` seconds; the SeT model is kept for the picture of its plan."""
    seconds = [time_steps(*prepare(name), PROBE_STEPS) for name in (SOFTMAX, SET)]
    steps = affordable_steps(STEPS, seconds, budget)
    (_, softmax), (model, ours) = (fit(name, steps) for name in (SOFTMAX, SET))
    return model, {
        "test_images": len(load()[3]),
        "length": PIXELS,
        "steps_wanted": STEPS,
        "steps": steps,
        "models": [softmax, ours],
    }
