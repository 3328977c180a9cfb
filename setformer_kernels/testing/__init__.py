"""Named cases and the error budget, shared by the tests of every backend and by the benchmarks."""

from .budget import assert_within_budget, gradients, model_inputs, rounding_unit
from .cases import ALL_CASES, CASES, Case, make

__all__ = [
    "ALL_CASES",
    "CASES",
    "Case",
    "assert_within_budget",
    "gradients",
    "make",
    "model_inputs",
    "rounding_unit",
]
