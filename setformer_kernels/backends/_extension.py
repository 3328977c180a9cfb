"""Loads the C++ extension once, remembers why it could not be loaded, and says how tensors reach it."""

from __future__ import annotations

import importlib
from types import ModuleType

# torch brings its own OpenMP runtime; loaded first, it is the one the extension's threads come from.
import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}
View = tuple[int, tuple[int, ...], tuple[int, ...], int]


def view(t: Tensor | None) -> View | None:
    """A tensor as the extension takes it: (pointer, sizes, strides, dtype code)."""
    return None if t is None else (t.data_ptr(), t.shape, t.stride(), DTYPE_CODES[t.dtype])


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("setformer_kernels._C"), ""
    except ImportError as error:
        return None, f"the C++ extension cannot be loaded ({error})"


MODULE, REASON = _load()
