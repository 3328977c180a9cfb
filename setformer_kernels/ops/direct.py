"""The short way from a call to its backend, where PyTorch's dispatcher would add nothing but its time.

A call through the dispatcher packs and unpacks twenty arguments twice.  What it does in between is for others:
subclasses of tensors, modes, transforms, tracers and profilers.  Without any of them, what is left is autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = frozenset((Tensor, torch.nn.Parameter, NoneType))
NUMBERS = frozenset((float, int, str))
# The dispatch keys of tensors that nothing was done to, on the devices that calls came from.
_ordinary: set[int] = set()


def unwatched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nobody but autograd has to see a call on these tensors."""
    if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, tensors)) or _watched():
        return False
    for t in tensors:
        if t is not None and torch._C._dispatch_keys(t).raw_repr() not in _ordinary and not _is_ordinary(t):
            return False
    return True


def _watched() -> bool:
    """Whether a mode, a transform, a tracer, a profiler or a level of forward AD is there."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _is_ordinary(t: Tensor) -> bool:
    """Whether `t` has the keys of a fresh tensor of its device; not so negated and zero views, wrappers, no memory."""
    device = t.device.type
    if device not in ("cpu", "cuda"):
        return False
    fresh = [torch.empty(0, device=device)]
    with torch.inference_mode():
        fresh.append(torch.empty(0, device=device))
    _ordinary.update(torch._C._dispatch_keys(one).raw_repr() for one in fresh)
    return torch._C._dispatch_keys(t).raw_repr() in _ordinary


def differentiated(args: Sequence[Any]) -> bool:
    """Whether autograd, or a level of forward AD, has to see this call."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, Tensor) and a.requires_grad:
                return True
    return False


def same_memory(given: Sequence[Tensor], read: Sequence[Tensor | None]) -> bool:
    """Whether what kernels read, where it is there, is what was given, not a copy or nothing."""
    pairs = [(a, b) for a, b in zip(given, read, strict=True) if b is not None]
    return all(a.numel() > 0 and a.dtype == b.dtype and a.data_ptr() == b.data_ptr() for a, b in pairs)


class Repeats:
    """Calls that were checked and answered once, for those that differ from them in values and addresses alone.

    What is kept of a call holds none of its tensors.
    """

    MOST = 1024

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Callable[..., Any] | None] = {}

    def facts(self, constants: tuple[Any, ...], tensors: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """All else that the answer depends on, types of numbers included: 1 and True are one number.

        None where more than these facts may count: under autocast, tensors in the place of numbers, and whatever
        `unwatched` looks for; a tensor that is not ordinary has dispatch keys of its own.
        """
        if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
            return None
        kinds, keys = tuple(map(type, constants)), torch._C._dispatch_keys
        if not (NUMBERS.issuperset(kinds) and PLAIN.issuperset(map(type, tensors))) or _watched():
            return None
        try:  # the keys tell the type of the device
            seen = [
                t if t is None
                else (t.shape, t.stride(), t.dtype, t.get_device(), t.requires_grad, keys(t).raw_repr())
                for t in tensors
            ]  # fmt: skip
        except RuntimeError:  # a nested tensor has no shape
            return None
        return (*constants, *kinds, *seen, torch.is_grad_enabled())

    def __contains__(self, facts: tuple[Any, ...]) -> bool:
        return facts in self._kept

    def get(self, facts: tuple[Any, ...]) -> Callable[..., Any] | None:
        """How a call of these facts is answered; None where the long way is the only one."""
        return self._kept.get(facts)

    def keep(self, facts: tuple[Any, ...], answer: Callable[..., Any] | None) -> None:
        if len(self._kept) >= self.MOST:
            self._kept.clear()
        self._kept[facts] = answer

    def clear(self) -> None:
        self._kept.clear()
