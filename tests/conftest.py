"""Shared fixtures: a seed for each test, and NaN in memory that torch.empty hands out."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from setformer_kernels import dispatch

NATIVE = tuple(dispatch.NATIVE)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin are filled with NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=[*NATIVE, "eager"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend behind the ops that can run here; "eager" stands in for a native one."""
    if request.param == "eager":
        stand_in = ModuleType("eager_stand_in")
        stand_in.__dict__.update(vars(dispatch.EAGER))
        stand_in.__dict__["unsupported_reasons"] = lambda problem: []
        monkeypatch.setattr(dispatch, "NATIVE", {"eager": stand_in})
        return "eager"
    if reasons := dispatch.available_backends()[request.param]:
        pytest.skip("; ".join(reasons))
    return request.param
