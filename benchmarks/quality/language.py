"""Bytes of the standard library, each from those before it: a causal decoder, of which only the heads' mixing differs.

SeT's is `CausalDecoder` itself (width 64, two blocks, T = 1, M = 64).  In its place stand softmax attention with rotary
positions, and linear attention with the elu + 1 feature map and the same gates.  The score is in bits per byte, and the
lowest is the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.model import Encoder
from benchmarks.quality.tasks import HEADS, Budget, Data, Task
from benchmarks.quality.train import Result, Variant
from benchmarks.tasks import sources, text
from benchmarks.tasks.training import Trainer, rate
from setformer_kernels.models import CausalDecoder, CausalLM

METRIC = "bits per byte"
DEPTH, REFERENCES, CONV_WIDTH = 2, 64, 4
BYTES = 2048  # of a step
TESTS = 200  # windows
Keys = tuple[Tensor, Tensor]


class Rotary(nn.Module):
    """Causal softmax attention with rotary positions; the state is the keys and values before, [B, H, S, D] each."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("speeds", 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim), persistent=False)

    def turned(self, x: Tensor, first: int) -> Tensor:
        """x [B, H, L, D], its pairs of numbers turned by the place, counted from first."""
        places = torch.arange(first, first + x.shape[2], device=x.device)
        angles = places.unsqueeze(-1) * self.speeds  # [L, D/2]
        sin, cos = angles.sin(), angles.cos()
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, log_decay: Tensor | None = None,
        state: Keys | None = None, need_state: bool = False,
    ) -> tuple[Tensor, Keys | None]:  # fmt: skip
        seen = 0 if state is None else state[0].shape[2]
        q, k = self.turned(q, seen), self.turned(k, seen)
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        if q.shape[2] > 1 and seen > 0:
            raise ValueError("after the first call, a token at a time")
        o = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return o, (k, v) if need_state else None


class GatedElu(nn.Module):
    """Causal linear attention with the elu + 1 feature map, in its quadratic form, of keys that gates let fade."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, log_decay: Tensor | None = None,
        state: None = None, need_state: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT  # [B, H, L, L]
        if log_decay is not None:
            since = log_decay.cumsum(-1)
            weights = weights * (since.unsqueeze(-1) - since.unsqueeze(-2)).clamp(max=0.0).exp()
        weights = weights.tril()
        return weights @ v / weights.sum(-1, keepdim=True), None


@dataclass(frozen=True)
class Mixing:
    """What is between the heads, and with what: kind "set", "softmax" or "elu"."""

    kind: str
    gate: bool = False
    conv: bool = False

    def decoder(self, width: int = text.WIDTH, heads: int = HEADS, depth: int = DEPTH) -> CausalDecoder:
        model = CausalDecoder(
            256, width, depth, heads, 2 * width, num_references=REFERENCES, gate=self.gate,
            conv_width=CONV_WIDTH if self.conv else 1,
        )  # fmt: skip
        others: dict[str, Callable[[], nn.Module]] = {"softmax": lambda: Rotary(width // heads), "elu": GatedElu}
        if self.kind in others:
            for block in model.blocks:
                block.attention.transport = others[self.kind]()
        return model


MIXINGS = {
    "softmax, rotary": Mixing("softmax"),
    "softmax, rotary, conv": Mixing("softmax", conv=True),
    "elu linear, gate, conv": Mixing("elu", gate=True, conv=True),
    "SeT causal": Mixing("set"),
    "SeT causal, conv": Mixing("set", conv=True),
    "SeT causal, gate": Mixing("set", gate=True),
    "SeT causal, gate, conv": Mixing("set", gate=True, conv=True),
}
VARIANTS = tuple(Variant(name, kind="causal") for name in MIXINGS)


@cache
def data(length: int, tests: int) -> Data:
    """Windows of standard-library source and the byte after each of theirs; no file is in both splits."""
    corpus = sources.load(length=length + 1, max_test_chunks=tests)

    def sample(batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        tokens = corpus.sample(batch, rng)[0]
        return tokens[:, :-1], tokens[:, 1:].flatten()

    return Data(sample, corpus.test_tokens[:, :-1], corpus.test_tokens[:, 1:])


class Rows(nn.Module):
    """Logits of all places, one below another: [B·L, 256]."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).flatten(0, 1)


def initial(name: str, seed: int) -> Rows:
    """The model of a variant; what softmax attention with a convolution and gates has too starts alike for all."""
    torch.manual_seed(seed)
    common = Rows(CausalLM(Mixing("softmax", gate=True, conv=True).decoder()))
    model = Rows(CausalLM(MIXINGS[name].decoder()))
    model.load_state_dict(common.state_dict(), strict=False)
    return model


def run(task: Task, variant: Variant, seed: int, budget: Budget) -> Result:
    """Train with the budget, then measure the bits of a byte of the test."""
    found, rng = task.data(budget), np.random.default_rng(seed)
    model = initial(variant.name, seed)
    trainer = Trainer(model, lambda: found.sample(budget.batch, rng), label_smoothing=0.0)
    steps = range(budget.steps)
    losses = [trainer.step(budget.learning_rate * rate((i + 0.5) / budget.steps))[0] for i in steps]
    score = bits(model, found.tokens, found.labels)
    return Result(score, float(np.mean(losses[-10:])), sum(p.numel() for p in model.parameters()))


@torch.no_grad()
def bits(model: nn.Module, tokens: Tensor, labels: Tensor) -> float:
    """Mean −log₂ p of the labels [N, L]."""
    model.eval()
    total = sum(
        F.cross_entropy(model(x), y.flatten(), reduction="sum").item()
        for x, y in zip(tokens.split(8), labels.split(8), strict=True)
    )
    return total / labels.numel() / math.log(2)


def nothing(*_: object) -> Encoder:
    raise NotImplementedError("a language task runs by benchmarks.quality.language.run")


def language(name: str, length: int) -> Task:
    budget = Budget(500, BYTES // length, 3e-3, test=TESTS)
    return Task(
        name, f"bytes from those before, length {length}", METRIC, budget,
        lambda budget: data(length, budget.test), nothing, nothing,
    )  # fmt: skip


TASKS = (language("lm", 256), language("lm1024", 1024))
BY_NAME = {task.name: task for task in TASKS}


def quick(budget: Budget) -> Budget:
    return replace(budget.quick(), steps=2, batch=2, test=2)
