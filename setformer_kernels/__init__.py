"""SeT attention: self-optimal transport as a linear-time drop-in for `nn.MultiheadAttention`."""

from .dispatch import available_backends

__version__ = "0.1.0"

__all__ = ["__version__", "available_backends"]
