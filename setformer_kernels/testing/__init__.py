"""Named cases and the error budget, shared by the tests of every backend and by the benchmarks."""

from . import measure
from .budget import (
    assert_typically_within_budget,
    assert_within_budget,
    gradients,
    model_inputs,
    products_of,
    rounding_unit,
    sizes,
)
from .cases import ALL_CASES, CASES, MASKED_CASES, Case, make

__all__ = [
    "ALL_CASES",
    "CASES",
    "MASKED_CASES",
    "Case",
    "assert_typically_within_budget",
    "assert_within_budget",
    "gradients",
    "make",
    "measure",
    "model_inputs",
    "products_of",
    "rounding_unit",
    "sizes",
]
