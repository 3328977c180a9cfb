"""(b) byte-level text classification.  Each model runs in a process of its own, so that its peak memory is its own.

`compare` starts both processes (`python -m demo.text ATTENTION`) and asks each for one step in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any, TextIO

import numpy as np
import torch

from benchmarks.tasks.sources import LENGTH, Corpus, load
from benchmarks.tasks.text import STD, WIDTH, ByteEmbedding
from benchmarks.tasks.training import Trainer, peak_memory, predict, train_together

from .models import SET, SOFTMAX, Attention, Classifier, build_pair, place_references

STEPS, BATCH, LEARNING_RATE, SEED = 300, 4, 3e-3, 0
HEADS, DEPTH, REFERENCES = 2, 1, 32


def trainer(name: str, corpus: Corpus) -> Trainer:
    """The model with attention `name`, and its training batches: the same for every name."""

    def build(attention: Attention) -> Classifier:
        position = STD * torch.randn(LENGTH, WIDTH)
        return Classifier(ByteEmbedding(), position, len(corpus.packages), attention, heads=HEADS, depth=DEPTH)

    rng = np.random.default_rng(SEED)
    model = build_pair(build, name, REFERENCES, SEED)
    if name == SET:
        place_references(model, corpus.sample(BATCH, np.random.default_rng(SEED + 1))[0])
    return Trainer(model, lambda: corpus.sample(BATCH, rng))


def serve(name: str, requests: TextIO, answers: TextIO) -> None:
    """The process of one model: a line with a learning rate asks for a step; the end of the input asks for the test.

    `peak_step_bytes` is what training added to the memory that the process held before its first step.
    """

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    corpus = load()
    model = trainer(name, corpus)
    before = peak_memory()
    answer("ready")
    for line in requests:
        answer(model.step(float(line)))
    added = peak_memory() - before
    start = time.perf_counter()
    predicted = predict(model.model, corpus.test_tokens, BATCH)
    seconds = (time.perf_counter() - start) / len(predicted)
    accuracy = (predicted == corpus.test_labels).double().mean().item()
    answer({"accuracy": accuracy, "peak_step_bytes": added, "inference_seconds_per_chunk": seconds})


class Worker:
    """A fresh Python that runs `serve`, so that a model's peak memory is its own."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "demo.text", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a model ended with status {self._close()}; its error is above")
        return json.loads(line)

    def step(self, learning_rate: float) -> tuple[float, float]:
        print(learning_rate, file=self.process.stdin, flush=True)
        return tuple(self._answer())

    def finish(self) -> dict[str, float]:
        """Test the model and end the process."""
        self.process.stdin.close()
        result = self._answer()
        self._close()
        return result

    def _close(self) -> int:
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


def compare(budget: float) -> dict[str, Any]:
    """Both models, each in its own process, for as many steps as fit `budget` seconds, then on the test files."""
    corpus = load()
    workers = {name: Worker(name) for name in (SOFTMAX, SET)}
    runs = train_together({name: worker.step for name, worker in workers.items()}, STEPS, budget, LEARNING_RATE)
    rows = [run.summary() | workers[run.attention].finish() for run in runs]
    return {
        "length": LENGTH,
        "packages": corpus.packages,
        "files": {"train": corpus.files[0], "test": corpus.files[1]},
        "test_samples": len(corpus.test_labels),
        "majority_share": torch.bincount(corpus.test_labels).max().item() / len(corpus.test_labels),
        "steps_wanted": STEPS,
        "steps": len(runs[0].losses),
        "models": rows,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m demo.text", description="One model, trained as stdin asks.")
    parser.add_argument("attention", choices=(SOFTMAX, SET))
    serve(parser.parse_args().attention, sys.stdin, sys.stdout)
