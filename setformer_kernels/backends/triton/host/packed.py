"""Packed batches: the tables of their segments, made on the device, which nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor

from ....problem import Operands, replaced
from .groups import Segments


def segments_of(cu: Tensor, total: int) -> Segments:
    """Of offsets [N + 1], kept within 0 .. total; a segment that ends before it begins is empty."""
    at = cu.clamp(0, total)
    first, count = at[:-1], (at[1:] - at[:-1]).clamp_min(0)
    uniform = torch.where(count > 0, -count.clamp_min(1).double().log2(), 0.0)
    return Segments(first.contiguous(), count.to(torch.int32), uniform.float())


def beside_the_largest(x: Operands, cu: Tensor) -> Operands:
    """With every segment's log masses relative to its largest: what all share cancels before it costs digits."""
    if x.log_a is None:
        return x
    n = cu.shape[0]  # the last for what is no segment's
    rows = torch.arange(x.log_a.shape[2], device=cu.device)
    segment = (torch.searchsorted(cu, rows, right=True) - 1).clamp(0, n - 1).expand(x.log_a.shape[1:])
    log_a = x.log_a[0]
    top = log_a.new_full((log_a.shape[0], n), -torch.inf).scatter_reduce(1, segment, log_a, "amax")
    return replaced(x, log_a=(log_a - torch.where(top > -torch.inf, top, 0.0).gather(1, segment)).unsqueeze(0))
