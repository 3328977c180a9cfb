"""Training and measuring one classifier; the same steps, batches and learning rates for whatever attention it has."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

Batch = tuple[Tensor, Tensor]


@dataclass
class Run:
    """What one training run measured."""

    name: str
    steps: int
    accuracy: float = 0.0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | int | str]:
        return {
            "attention": self.name,
            "steps": self.steps,
            "accuracy": self.accuracy,
            "final_loss": sum(self.losses[-10:]) / len(self.losses[-10:]),
            "train_seconds": sum(self.step_seconds),
            "seconds_per_step": median(self.step_seconds),
        }


def train(model: nn.Module, batch: Callable[[], Batch], run: Run, learning_rate: float) -> None:
    """`run.steps` steps of AdamW, linear warm-up over a tenth of them, then a cosine down to zero."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    warm_up = max(0.1, 2 / run.steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=run.steps, pct_start=warm_up)
    progress = tqdm(range(run.steps), desc=f"  {run.name:<22}", unit="step", mininterval=0.5)
    for _ in progress:
        tokens, labels = batch()
        start = time.perf_counter()
        loss = F.cross_entropy(model(tokens), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.step_seconds.append(time.perf_counter() - start)
        run.losses.append(loss.item())
        schedule.step()
        progress.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)


def time_steps(model: nn.Module, batch: Callable[[], Batch], count: int) -> float:
    """Median seconds of `count` forward and backward passes after one to warm up; the weights stay as they are."""
    seconds = []
    for _ in range(count + 1):
        tokens, labels = batch()
        start = time.perf_counter()
        F.cross_entropy(model(tokens), labels).backward()
        seconds.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    return median(seconds[1:])


def affordable_steps(wanted: int, seconds: Iterable[float], budget: float) -> int:
    """Steps that every model can do when they share `budget` seconds; at most `wanted`, at least 10.

    `seconds` holds one step of each model: all get the same number, so that the comparison stays fair.
    """
    return max(10, min(wanted, int(budget / sum(seconds))))


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
