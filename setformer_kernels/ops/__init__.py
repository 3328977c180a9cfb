"""The native ops: one meaning each; the backend that runs a call is chosen inside, from real integers."""

from . import attention, causal, features, masked, memory, packed, sharding, sinkhorn, step, weights

__all__ = ["attention", "causal", "features", "masked", "memory", "packed", "sharding", "sinkhorn", "step", "weights"]
