"""The specification: SeT attention as plain PyTorch, differentiable by plain autograd to any order."""

from .attention import attention, causal, masked, masked_weights, plan, pool, uniform_mass, weight_factors, weights
from .centring import LARGEST, Centring, centring, limit, log_bound
from .features import inverse_sqrt, nystrom_features
from .logits import kernel_matrix, logits, normalise, squared_distance
from .transport import Plan, lse, pool_weights, potential, read_weights, sinkhorn

NAME = "reference"

__all__ = [
    "LARGEST",
    "NAME",
    "Centring",
    "Plan",
    "attention",
    "causal",
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
    "plan",
    "pool",
    "pool_weights",
    "potential",
    "read_weights",
    "sinkhorn",
    "squared_distance",
    "uniform_mass",
    "weight_factors",
    "weights",
]
