"""Parameters and multiply-adds of models, counted without running them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def multiply_adds(run: Callable[[], Any]) -> int:
    """What papers on vision backbones call FLOPs: half of torch's count, which takes a multiply and an add for two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2
