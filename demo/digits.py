"""(a) scikit-learn's handwritten digits: 8 x 8 pixels, one token a pixel, one small transformer, two attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.tasks.digits import SEED, load
from benchmarks.tasks.training import Batch, Trainer, predict, train_together

from .models import SET, SOFTMAX, Attention, Classifier, build_pair, place_references

STEPS, BATCH, LEARNING_RATE = 400, 64, 3e-3
WIDTH, HEADS, DEPTH, REFERENCES = 64, 4, 2, 16
PIXELS = 64


def build(attention: Attention) -> Classifier:
    position = 0.5 * torch.randn(PIXELS, WIDTH)  # as large as an embedded pixel: a digit is where its ink is
    return Classifier(nn.Linear(1, WIDTH), position, 10, attention, heads=HEADS, depth=DEPTH)


def trainer(name: str) -> Trainer:
    """The model with attention `name`, and its training batches: the same for every name."""
    x, y, _, _ = load()
    model = build_pair(build, name, REFERENCES, SEED)
    generator = torch.Generator().manual_seed(SEED)
    if name == SET:
        place_references(model, x[:BATCH])

    def batch() -> Batch:
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        return x[rows], y[rows]

    return Trainer(model, batch)


def compare(budget: float) -> tuple[Classifier, dict[str, Any]]:
    """Both models for as many steps as fit `budget` seconds; the SeT model is kept for the picture of its plan."""
    trainers = {name: trainer(name) for name in (SOFTMAX, SET)}
    runs = train_together({name: t.step for name, t in trainers.items()}, STEPS, budget, LEARNING_RATE)
    _, _, x_test, y_test = load()
    for run in runs:
        predicted = predict(trainers[run.attention].model, x_test, 256)
        run.accuracy = (predicted == y_test).double().mean().item()
    result = {"length": PIXELS, "test_samples": len(y_test), "steps_wanted": STEPS, "steps": len(runs[0].losses)}
    return trainers[SET].model, result | {"models": [run.summary() for run in runs]}
