"""Training and measuring classifiers: the same steps, batches and learning rates for whatever attention they have."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_STEPS = 10

Batch = tuple[Tensor, Tensor]
Step = Callable[[float], tuple[float, float]]  # learning rate -> (loss, seconds)


@dataclass
class Run:
    """What training one model measured."""

    attention: str
    accuracy: float = 0.0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | int | str]:
        return {
            "attention": self.attention,
            "steps": len(self.losses),
            "accuracy": self.accuracy,
            "final_loss": sum(self.losses[-10:]) / len(self.losses[-10:]),
            "train_seconds": sum(self.step_seconds),
            "seconds_per_step": median(self.step_seconds),
        }


class Trainer:
    """One model, its AdamW and its stream of batches."""

    def __init__(self, model: nn.Module, batch: Callable[[], Batch], label_smoothing: float = 0.05) -> None:
        self.model, self.batch, self.label_smoothing = model, batch, label_smoothing
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)

    def step(self, learning_rate: float) -> tuple[float, float]:
        """One optimizer step: its loss and its seconds, those of preparing the batch left out."""
        self.model.train()
        tokens, labels = self.batch()
        self.optimizer.param_groups[0]["lr"] = learning_rate
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(tokens), labels, label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item(), time.perf_counter() - start


def rate(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: a tenth of it warms up, then a cosine down to zero."""
    return min(1.0, progress / 0.1) * (1 + math.cos(math.pi * progress)) / 2


def train_together(steps: dict[str, Step], wanted: int, budget: float, learning_rate: float) -> list[Run]:
    """Train all models step by step in turn, so that all do the same steps and noise hits all alike.

    Where `budget` seconds are too few for the `wanted` steps, the schedule runs faster and ends when they are over
    (not before `MIN_STEPS`): for all models at the same step.
    """
    from tqdm import tqdm

    runs = {name: Run(name) for name in steps}
    start = time.perf_counter()
    bar = tqdm(range(wanted), desc="  training both", unit="step", mininterval=0.5)
    for i in bar:
        progress = max((i + 0.5) / wanted, (time.perf_counter() - start) / max(budget, 1.0))
        if progress >= 1 and i >= MIN_STEPS:
            break
        for name, step in steps.items():
            loss, seconds = step(learning_rate * rate(min(progress, 1.0)))
            runs[name].losses.append(loss)
            runs[name].step_seconds.append(seconds)
        bar.set_postfix_str(", ".join(f"{run.losses[-1]:.2f}" for run in runs.values()), refresh=False)
    bar.close()
    return list(runs.values())


@torch.no_grad()
def predict(model: nn.Module, tokens: Tensor, batch_size: int) -> Tensor:
    """The predicted class of every row of `tokens`."""
    model.eval()
    return torch.cat([model(part).argmax(-1) for part in tokens.split(batch_size)])


def peak_memory() -> int:
    """The most memory this process has had resident so far, in bytes.

    Linux keeps it per program image (`VmHWM`); `ru_maxrss` would start from the process that launched this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
