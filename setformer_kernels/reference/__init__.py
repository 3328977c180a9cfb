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
from .centring import LARGEST, Centring, centring, limit, log_bound
from .features import inverse_sqrt, nystrom_features
from .logits import kernel_matrix, logits, normalise, squared_distance
from .memory import read, transport
from .packed import packed, packed_causal, packed_causal_with_state, packed_pool
from .transport import Plan, lse, pool_weights, potential, read_weights, sinkhorn

NAME = "reference"

__all__ = [
    "LARGEST",
    "NAME",
    "Centring",
    "Plan",
    "attention",
    "causal",
    "causal_with_state",
    "centring",
    "inverse_sqrt",
    "kernel_matrix",
    "limit",
    "log_bound",
    "logits",
    "lse",
    "masked",
    "masked_weights",
    "normalise",
    "nystrom_features",
    "packed",
    "packed_causal",
    "packed_causal_with_state",
    "packed_pool",
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
