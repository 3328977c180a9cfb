"""Loads the C++ extension once, remembers why it could not be loaded, and says how tensors reach it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

# torch brings its own OpenMP runtime; loaded first, it is the one the extension's threads come from.
import torch
from torch import Tensor

from ..problem import empty_in_order

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}
View = tuple[int, tuple[int, ...], tuple[int, ...], int]


def view(t: Tensor | None) -> View | None:
    """A tensor as the extension takes it: (pointer, sizes, strides, dtype code)."""
    return None if t is None else (t.data_ptr(), t.shape, t.stride(), DTYPE_CODES[t.dtype])


Views = tuple[View | None, ...]


def sinkhorn(
    inputs: Sequence[Tensor | None], num_iters: int, run: Callable[[Views], None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f [G, N], g [G, M], c [G, max(T, 1), M], iters [G] of (log_kernel, log_a, log_b, λ_a, λ_b)."""
    log_kernel = inputs[0]
    assert log_kernel is not None
    groups, n, m = log_kernel.shape
    f, g = log_kernel.new_empty((groups, n)), log_kernel.new_empty((groups, m))
    c = log_kernel.new_empty((groups, max(num_iters, 1), m))
    iters = log_kernel.new_empty(groups, dtype=torch.int64)
    run(tuple([view(t) for t in (*inputs, f, g, c, iters, *[None] * 6)]))
    return f, g, c, iters


def sinkhorn_backward(
    inputs: Sequence[Tensor | None], given: Sequence[Tensor], needs: Sequence[bool], run: Callable[[Views], None]
) -> tuple[Tensor | None, ...]:
    """Gradients of `sinkhorn`'s inputs, None where not needed; given: c, iters, d_f, d_g."""
    wanted = [t if n else None for t, n in zip(inputs, needs, strict=True)]
    grads = [None if t is None else empty_in_order(t, t.shape) for t in wanted[:3]]
    relaxed = any(t is not None for t in wanted[3:])
    d_lam = given[0].new_empty((given[0].shape[0], 2)) if relaxed else None
    run(tuple([view(t) for t in (*inputs, None, None, *given, *grads, d_lam)]))
    return *grads, *(None if t is None or d_lam is None else d_lam[:, i].contiguous() for i, t in enumerate(wanted[3:]))


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("setformer_kernels._C"), ""
    except ImportError as error:
        return None, f"the C++ extension cannot be loaded ({error})"


MODULE, REASON = _load()
