"""SeT attention: self-optimal transport as a linear-time drop-in for `nn.MultiheadAttention`."""

from . import advice, distributed, functional, ot
from .dispatch import available_backends
from .nn import SeTAttention, SeTPooling

__version__ = "0.1.0"

__all__ = [
    "SeTAttention",
    "SeTPooling",
    "__version__",
    "advice",
    "available_backends",
    "distributed",
    "functional",
    "ot",
]
