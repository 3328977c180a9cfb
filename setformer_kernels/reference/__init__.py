"""The specification: SeT attention as plain PyTorch, differentiable by plain autograd to any order."""

from .attention import (
    attention,
    causal,
    causal_with_state,
    masked,
    masked_weights,
    plan,
    pool,
    step,
    uniform_mass,
    weight_factors,
    weights,
)
from .features import inverse_sqrt, nystrom_features
from .logits import kernel_matrix, logits, normalise, squared_distance
from .memory import read, transport
from .transport import Plan, lse, pool_weights, potential, read_weights, sinkhorn

NAME = "reference"

__all__ = [
    "NAME",
    "Plan",
    "attention",
    "causal",
    "causal_with_state",
    "inverse_sqrt",
    "kernel_matrix",
    "logits",
    "lse",
    "masked",
    "masked_weights",
    "normalise",
    "nystrom_features",
    "plan",
    "pool",
    "pool_weights",
    "potential",
    "read",
    "read_weights",
    "sinkhorn",
    "squared_distance",
    "step",
    "transport",
    "uniform_mass",
    "weight_factors",
    "weights",
]
