"""One run: a task, a variant and a seed to a score."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.quality.model import Alone, Elu, Encoder, Softmax, Started
from benchmarks.quality.tasks import Budget, Task
from benchmarks.tasks.encoder import Attention
from benchmarks.tasks.training import Trainer, predict, rate
from setformer_kernels import SeTAttention

TEST_BATCH = 50
CONVERGED = {"tol": 1e-4, "grad": "implicit"}


@dataclass(frozen=True)
class Variant:
    """One attention.  The fields after `kind` are SeT's own, and those of `SET` are its defaults in this table."""

    name: str
    kind: str = "set"  # "softmax", "elu", "alone"
    num_iters: int = 3
    num_references: int = 64
    value_map: str = "linear"
    positions: bool = True
    epsilon: float = 0.05
    bandwidth: float = 1.0
    transport: str = "iterations"  # "converged": to CONVERGED; "started": where the last step's potentials ended

    def attention(self, position_dim: int) -> Attention:
        """The module to build, for tokens with `position_dim` coordinates."""
        if self.kind != "set":
            return {"softmax": Softmax, "elu": Elu, "alone": Alone}[self.kind]
        return partial(
            Started if self.transport == "started" else SeTAttention, batch_first=True,
            num_references=self.num_references, num_iters=self.num_iters, value_map=self.value_map,
            epsilon=self.epsilon, bandwidth=self.bandwidth, position_dim=position_dim if self.positions else 0,
            **(CONVERGED if self.transport == "converged" else {}),
        )  # fmt: skip


SOFTMAX, SET = Variant("softmax", kind="softmax"), Variant("SeT, T = 3")
VARIANTS = (
    SOFTMAX,
    SET,
    Variant("elu linear", kind="elu"),
    Variant("no attention", kind="alone"),
    Variant("SeT, T = 0", num_iters=0),
    Variant("SeT, T = 1", num_iters=1),
    Variant("SeT, T = 5", num_iters=5),
    Variant("SeT, M = 16", num_references=16),
    Variant("SeT, RKHS values", value_map="rkhs"),
    Variant("SeT, no positions", positions=False),
    Variant("SeT, ε = 0.2", epsilon=0.2),
    Variant("SeT, ε = 0.0125", epsilon=0.0125),
)
# What iterations that go on to the transport itself would give: run where they are named.
TO_THE_END = tuple(
    Variant(f"SeT{at}, {transport}", num_iters=iters, epsilon=epsilon, transport=transport)
    for at, epsilon in (("", 0.05), (", ε = 0.0125", 0.0125))
    for transport, iters in (("converged", 500), ("started", 3))
)


@dataclass(frozen=True)
class Result:
    """What one run gave."""

    score: float
    final_loss: float  # of the last ten steps, training
    parameters: int


def initial(task: Task, variant: Variant, seed: int) -> Encoder:
    """The model of a variant; whatever softmax attention has too starts from the same values for all variants."""
    torch.manual_seed(seed)
    softmax = task.build(SOFTMAX.attention(0))
    model = task.build(variant.attention(softmax.position.shape[1]))
    model.load_state_dict(softmax.state_dict(), strict=False)
    return model


def run(task: Task, variant: Variant, seed: int, budget: Budget) -> Result:
    """Train with the budget, then score the test."""
    data, rng = task.data(budget), np.random.default_rng(seed)
    model = initial(task, variant, seed)
    trainer = Trainer(model, lambda: data.sample(budget.batch, rng))
    steps = range(budget.steps)
    losses = [trainer.step(budget.learning_rate * rate((i + 0.5) / budget.steps))[0] for i in steps]
    score = task.score(predict(model, data.tokens, TEST_BATCH), data.labels)
    return Result(score, float(np.mean(losses[-10:])), sum(p.numel() for p in model.parameters()))
