"""pytest-benchmark microbenchmarks: `python -m pytest benchmarks --benchmark-enable` from the repository root.

Each group holds the same call on the backend `auto` takes and on the reference.  For comparisons between libraries use
`python -m benchmarks`, which interleaves its rounds; here every case runs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import setformer_kernels.functional as SF
from benchmarks.common.cases import BOTH, MODES, AttentionCase, SinkhornCase, attention_inputs, sinkhorn_log_kernel

Benchmark = Callable[..., Any]
LENGTH = 1024
BACKENDS = ("auto", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def _step(call: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], mode: str) -> Callable[[], object]:
    """A forward, or a forward and the gradients of the sum of its output."""
    if mode == BOTH:
        return lambda: torch.autograd.grad(call().sum(), leaves)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return call()

    return forward


@pytest.mark.parametrize("T", [1, 3])
def test_set_attention(benchmark: Benchmark, backend: str, mode: str, T: int) -> None:
    benchmark.group = f"set_attention {mode} T={T} L={LENGTH}"
    x = attention_inputs(AttentionCase("micro", LENGTH, mode))
    benchmark(_step(lambda: SF.set_attention(*x.leaves(), num_iters=T, backend=backend), x.leaves(), mode))


def test_set_attention_causal(benchmark: Benchmark, backend: str, mode: str) -> None:
    benchmark.group = f"set_attention causal {mode} T=1 L=256"
    x = attention_inputs(AttentionCase("micro", 256, mode))
    call = lambda: SF.set_attention(*x.leaves(), num_iters=1, causal=True, backend=backend)  # noqa: E731
    benchmark(_step(call, x.leaves(), mode))


def test_set_pool(benchmark: Benchmark, backend: str, mode: str) -> None:
    benchmark.group = f"set_pool {mode} L={LENGTH}"
    x = attention_inputs(AttentionCase("micro", LENGTH, mode))
    leaves = x.leaves()[1:]
    benchmark(_step(lambda: SF.set_pool(*leaves, backend=backend), leaves, mode))


def test_nystrom_features(benchmark: Benchmark, backend: str, mode: str) -> None:
    benchmark.group = f"nystrom_features {mode} N={LENGTH} R=64"
    x = attention_inputs(AttentionCase("micro", LENGTH, mode))
    leaves = (x.key, x.references)
    benchmark(_step(lambda: SF.nystrom_features(*leaves, backend=backend), leaves, mode))


def test_sinkhorn(benchmark: Benchmark, backend: str, mode: str) -> None:
    benchmark.group = f"sinkhorn {mode} 8 x {LENGTH} x 64, 20 iterations"
    log_kernel = sinkhorn_log_kernel(SinkhornCase("micro", G=8, N=LENGTH, M=64, T=20, mode=mode))
    call = lambda: torch.cat(SF.sinkhorn(log_kernel, num_iters=20, backend=backend), dim=-1)  # noqa: E731
    benchmark(_step(call, (log_kernel,), mode))
