"""(b) byte-level text classification.  Each model runs in a process of its own, so that its peak memory is its own.

`python -m demo.text probe|train ATTENTION STEPS` prints one line of JSON; `compare` starts these processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .models import SET, SOFTMAX, Attention, Classifier, build_pair, place_references
from .sources import LENGTH, Corpus, load
from .training import Batch, Run, affordable_steps, peak_memory, predict, time_steps, train

STEPS, BATCH, LEARNING_RATE, SEED = 300, 4, 3e-3, 0
WIDTH, HEADS, DEPTH, REFERENCES = 64, 2, 1, 32
BUCKETS, GRAMS = 8192, (2, 3, 4, 6)
PROBE_STEPS = 2
STD = 0.02  # of embeddings and positions at the start, as in GPT-2


class ByteEmbedding(nn.Module):
    """bytes [B,L] -> [B,L,WIDTH]: the byte's own vector plus hashed vectors of the last `GRAMS` bytes up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, WIDTH)
        self.grams = nn.ModuleDict({str(n): nn.Embedding(BUCKETS, WIDTH) for n in GRAMS})
        for table in (self.byte, *self.grams.values()):
            nn.init.normal_(table.weight, std=STD)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens)
        for n, table in self.grams.items():
            x = x + table(hashed_grams(tokens, int(n)))
        return x


def hashed_grams(tokens: Tensor, n: int) -> Tensor:
    """Bucket of the `n` bytes that end at each position (shorter at the start): [B,L] in [0, BUCKETS)."""
    code = torch.zeros_like(tokens)
    for back in range(n):
        shifted = nn.functional.pad(tokens, (back, 0))[:, : tokens.shape[1]]
        code = (code * 1_000_003 + shifted + 1) % 2_147_483_647
    return code % BUCKETS


def prepare(name: str) -> tuple[Corpus, Classifier, Callable[[], Batch]]:
    """The data, the model with attention `name`, and its training batches: the same for every name."""
    corpus = load()

    def build(attention: Attention) -> Classifier:
        position = STD * torch.randn(LENGTH, WIDTH)
        return Classifier(ByteEmbedding(), position, len(corpus.packages), attention, heads=HEADS, depth=DEPTH)

    rng = np.random.default_rng(SEED)
    model = build_pair(build, name, REFERENCES, SEED)
    if name == SET:
        place_references(model, corpus.sample(BATCH, np.random.default_rng(SEED + 1))[0])
    return corpus, model, lambda: corpus.sample(BATCH, rng)


def probe(name: str) -> dict[str, Any]:
    """Seconds of a step, and the memory that steps add to what the process holds before the first one."""
    _, model, batch = prepare(name)
    before = peak_memory()
    seconds = time_steps(model, batch, PROBE_STEPS)
    return {"attention": name, "seconds_per_step": seconds, "peak_step_bytes": peak_memory() - before}


def fit(name: str, steps: int) -> dict[str, Any]:
    """Train for `steps` steps, then classify the chunks of the test files."""
    corpus, model, batch = prepare(name)
    run = Run(name, steps)
    train(model, batch, run, LEARNING_RATE)
    start = time.perf_counter()
    predicted = predict(model, corpus.test_tokens, BATCH)
    seconds = (time.perf_counter() - start) / len(predicted)
    run.accuracy = (predicted == corpus.test_labels).double().mean().item()
    return run.summary() | {"inference_seconds_per_chunk": seconds}


def in_own_process(task: str, name: str, steps: int = 0) -> dict[str, Any]:
    """Run `task` in a fresh Python; its progress goes to this terminal, its result comes back as JSON."""
    command = [sys.executable, "-m", "demo.text", task, name, str(steps)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def compare(budget: float) -> dict[str, Any]:
    """Probe both models, agree on a number of steps that fits `budget` seconds, then train both for that many."""
    corpus = load()
    probes = [in_own_process("probe", name) for name in (SOFTMAX, SET)]
    seconds = [row["seconds_per_step"] for row in probes]
    testing = sum(seconds) / 3 * len(corpus.test_labels) / BATCH  # a forward pass is about a third of a step
    steps = affordable_steps(STEPS, seconds, budget - testing)
    rows = [
        in_own_process("train", row["attention"], steps) | {"peak_step_bytes": row["peak_step_bytes"]} for row in probes
    ]
    return {
        "packages": corpus.packages,
        "files": {"train": corpus.files[0], "test": corpus.files[1]},
        "test_chunks": len(corpus.test_labels),
        "majority_share": torch.bincount(corpus.test_labels).max().item() / len(corpus.test_labels),
        "length": LENGTH,
        "steps_wanted": STEPS,
        "steps": steps,
        "models": rows,
    }


if __name__ == "__main__":
    task, name, steps = sys.argv[1:]
    print(json.dumps(probe(name) if task == "probe" else fit(name, int(steps))))
