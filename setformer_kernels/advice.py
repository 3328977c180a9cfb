"""Calls that could be linear, and are not for their arguments, are told what would be, and calls to converge that have
not how far they are: once in a process for each kind.

`setformer_kernels.advice.enabled = False` silences it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

enabled = True
MOST_LOOKED_AT = 16  # masks; a loop has its mask from the start, and looking costs a pass over the mask
# What stands between the caller and this file: frames of the package and of torch's modules.
INSIDE = tuple(str(Path(module.__file__ or "").parent) for module in (torch, sys.modules[__package__]))
UNCONVERGED = (
    "transport has not converged in num_iters = {}: the largest marginal error of {} problems is {:.1e}. What helps:"
    " more iterations, method='newton' (with grad='implicit'), a larger epsilon or tol; return_info=True says which"
)
_told: set[str] = set()
_looked_at = 0

MASK = (
    "attn_mask is the causal mask, and every query is answered as if it were any mask, in O(T·L·S·M) time: without it,"
    " causal=True (is_causal=True of a module, beside the mask or alone) is the same call and for num_iters <= 1 one"
    " linear scan"
)
ITERATIONS = (
    "a causal call with num_iters = {} takes O(T·L·S·M) time, and one linear scan with num_iters <= 1, which is what"
    " measured models want; more bring the plan nearer to the optimum"
)


def slower_than_linear(mask: Tensor | None, causal: bool, num_iters: int, square: bool) -> None:
    """Warns of a call on the path of masks, [B or 1, H or 1, L, S], that a causal scan could answer.

    Nothing on a device is read and nobody who traces or transforms is told: there it is not known what a mask holds.
    """
    if torch.compiler.is_compiling() or not enabled or not square:
        return
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return
    if torch._C._get_tracing_state() is not None:
        return
    if mask is None:
        if causal and num_iters > 1:
            _tell("iterations", ITERATIONS.format(num_iters))
    elif not causal and _is_looked_at(mask) and is_causal(mask[0, 0]):
        _tell("mask", MASK)


def unconverged(num_iters: int, converged: Tensor, error: Tensor) -> None:
    """Warns of problems [...] on the CPU that stopped at the most iterations."""
    if enabled and not bool(converged.all()):
        _tell("converged", UNCONVERGED.format(num_iters, int((~converged).sum()), float(error[~converged].max())))


def is_causal(mask: Tensor) -> bool:
    """Whether the mask [L, L] lets query i see the keys s ≤ i, all with the same mass, and no other."""
    length = mask.shape[-1]
    seen = mask if mask.dtype == torch.bool else mask == 0
    if length < 2 or not bool(seen[-1].all()) or bool(seen[0, 1:].any()):  # two rows tell most masks from it
        return False
    if not torch.equal(seen, torch.ones_like(seen).tril()):
        return False
    return mask.dtype == torch.bool or bool((seen | (mask == -torch.inf)).all())


def _is_looked_at(mask: Tensor) -> bool:
    """Whether the mask is one for all heads, in a CPU's memory, without a gradient, and one of a process's first."""
    global _looked_at
    if "mask" in _told or _looked_at >= MOST_LOOKED_AT:
        return False
    one = all(size == 1 or stride == 0 for size, stride in zip(mask.shape[:2], mask.stride()[:2], strict=True))
    if type(mask) is not Tensor or mask.device.type != "cpu" or mask.requires_grad or not one or mask.numel() == 0:
        return False
    _looked_at += 1
    return True


def _tell(kind: str, what: str) -> None:
    if kind in _told:
        return
    _told.add(kind)
    silence = f"Silence: {__name__}.enabled = False"
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{what}. {silence}", stacklevel=level)
