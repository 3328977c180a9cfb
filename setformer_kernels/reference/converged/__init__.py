"""Transport to convergence: when to stop, what was reached, Newton's method, and the gradient of the fixed point."""

from .attention import Transported, attention, pool, transport, weights
from .solve import Solver, TransportInfo, certified, plan_of, solve
from .system import Marginals

__all__ = [
    "Marginals",
    "Solver",
    "TransportInfo",
    "Transported",
    "attention",
    "certified",
    "plan_of",
    "pool",
    "solve",
    "transport",
    "weights",
]
