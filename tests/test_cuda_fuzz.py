"""Random calls and extreme scales on the CUDA kernels: on a GPU, or their own source on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import test_fuzz
import torch
from hypothesis import assume, given, settings
from test_cuda_kernels import backend, shim

__all__ = ["backend", "shim"]  # fixtures


def test_random_calls_match_the_reference(backend: str) -> None:
    @settings(test_fuzz.SETTINGS, max_examples=60)
    @given(drawn=test_fuzz.calls([torch.float32, torch.bfloat16, torch.float16]))
    def match(drawn: tuple[dict[str, Any], torch.dtype]) -> None:
        assume(not drawn[0]["causal"])
        test_fuzz.check(*drawn, backend)

    match()


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("kernel", ["rbf", "dot"])
def test_extreme_scales_stay_finite(scale: float, kernel: str, backend: str) -> None:
    test_fuzz.test_extreme_scales_stay_finite(scale, kernel, False, backend)
