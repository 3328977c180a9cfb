"""What a module's weights are."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def like(module: nn.Module) -> Tensor:
    """An empty tensor of the dtype and device of the module's weights, the references' too; packed integers have none
    and stand for the default dtype."""
    tensors = [*module.parameters(), *module.buffers(), *(x for x in vars(module).values() if isinstance(x, Tensor))]
    floating = [x for x in tensors if x.is_floating_point()]
    device = (floating or tensors)[0].device if tensors else None
    return torch.empty(0, device=device, dtype=floating[0].dtype if floating else None)
