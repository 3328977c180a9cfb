"""Loads the C++ extension once and remembers why it could not be loaded."""

from __future__ import annotations

import importlib
from types import ModuleType

# torch brings its own OpenMP runtime; loaded first, it is the one the extension's threads come from.
import torch  # noqa: F401


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("setformer_kernels._C"), ""
    except ImportError as error:
        return None, f"the C++ extension cannot be loaded ({error})"


MODULE, REASON = _load()
