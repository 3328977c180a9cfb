"""The CPU's causal scan by chunks of tokens: for any range of weights in a chunk, and blind to what comes later."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.backends import cpu
from setformer_kernels.testing import budget

pytestmark = pytest.mark.skipif(bool(cpu.ABSENT), reason=cpu.ABSENT)
B, H, S, M, D, E = 2, 2, 200, 9, 8, 6


def tokens() -> list[Tensor]:
    shapes = ((B, H, S, D), (B, H, S, D), (B, H, S, E), (H, M, D))
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def some_absent() -> Tensor:
    mass = torch.randn(S, dtype=torch.float64)
    mass[:70], mass[75:100:3], mass[130:199] = -math.inf, -math.inf, -math.inf
    return mass


# Log masses of the keys [S], and gates [S].
RANGES: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "plain": (None, None),
    "rising": (torch.linspace(-300, 300, S, dtype=torch.float64), None),
    "falling": (torch.linspace(300, -300, S, dtype=torch.float64), None),
    "one_far_above": (torch.zeros(S, dtype=torch.float64).index_fill(0, torch.tensor([90]), 80.0), None),
    "absent": (some_absent(), None),
    "faint_gates": (None, torch.full((S,), -0.02, dtype=torch.float64)),
    "gates": (some_absent(), torch.full((S,), -0.6, dtype=torch.float64)),
    "strong_gates": (None, torch.full((S,), -3.0, dtype=torch.float64)),
    "one_closed_gate": (None, torch.zeros(S, dtype=torch.float64).index_fill(0, torch.tensor([80]), -400.0)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "t0": {"num_iters": 0},
    "t1": {},
    "relaxed": {"key_relaxation": 0.4, "reference_relaxation": 0.7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("masses", "gates"), RANGES.values(), ids=RANGES)
def test_every_range_of_weights(masses: Tensor | None, gates: Tensor | None, options: dict[str, Any]) -> None:
    """Output, means of the state and every gradient."""
    given = dict(zip(("query", "key", "value", "references"), tokens(), strict=True))
    for name, row in (("key_mask", masses), ("log_decay", gates)):
        if row is not None:
            given[name] = row.expand(B, H, S)
    do, dz = torch.randn(B, H, S, E), torch.randn(B, H, M, E)

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = {name: t.float().to(dtype).requires_grad_() for name, t in given.items()}
        o, state = SF.set_causal(**inputs, output_final_state=True, backend=backend, **options)
        assert state is not None
        z = state[..., :E] / state[..., E : E + 1]
        grads = torch.autograd.grad((o * do).sum() + (z * dz).sum(), list(inputs.values()))
        return {"output": o, "means": z} | dict(zip(inputs, grads, strict=True))

    exact, model = run("reference", torch.float64), run("reference", torch.float32)
    budget.assert_half_of_the_digits(run("cpu", torch.float64), exact, model)
    budget.assert_within_budget(run("cpu", torch.float32), exact, model)


@pytest.mark.parametrize("hostile", [math.nan, math.inf, 3e38])
def test_nothing_of_a_later_token_reaches_an_earlier_one(hostile: float) -> None:
    q, k, v, y = (t.float() for t in tokens())
    call = functools.partial(SF.set_causal, references=y, backend="cpu")
    want, _ = call(q[:, :, :100], k[:, :, :100], v[:, :, :100])
    for spoiled in (q, k, v):
        kept = spoiled[:, :, 100:].clone()
        spoiled[:, :, 100:] = hostile
        o, _ = call(q, k, v)
        spoiled[:, :, 100:] = kept
        torch.testing.assert_close(o[:, :, :100], want, rtol=1e-5, atol=1e-5)
