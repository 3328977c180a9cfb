"""Values written into parameters so that the module reads them back, whatever stands between the two.

A parameter may be pruned or parametrized, carry the old weight_norm, or have a plain tensor in its place, as adapters
leave it: what a module computes with is then not what `copy_` on an attribute reaches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Init = Callable[[Tensor], Any]


@torch.no_grad()
def assign(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Makes each tensor `module.<name>` equal values[name], all of them or none; what is pruned away stays zero.

    The Parameter objects stay the same.

    Raises:
        ValueError: something computes the tensor that cannot give the value back.
    """
    names = sorted(values, key=lambda name: _plain(module, name))  # what may refuse comes first
    saved = [(store, store.clone()) for name in names if not _plain(module, name) for store in _stores(module, name)]
    try:
        for name in names:
            _write(module, name, values[name])
    except ValueError:
        for store, value in saved:
            store.copy_(value)
        for name in names:
            _refresh(module, name)
        raise


def redraw(module: nn.Module, inits: Mapping[str, Init]) -> None:
    """Draws tensors of the module anew, by inits that work in place as torch.nn.init's; a None stays None."""
    values = {}
    for name, init in inits.items():
        old = getattr(module, name)
        if isinstance(old, Tensor):
            values[name] = torch.empty_like(old, requires_grad=False)
            init(values[name])
    assign(module, values)


class Reset:
    """The `reset_parameters` of a layer of torch's own class that starts from other values than its class gives.

    An instance attribute, so that the layer keeps its class, by which quantization and others know it.  The reference
    to the layer is weak: a cycle would keep a deleted model's memory until the garbage collector runs.
    """

    def __init__(self, module: nn.Module, inits: Mapping[str, Init]) -> None:
        self._module, self._inits = weakref.ref(module), dict(inits)
        vars(module)["reset_parameters"] = self

    def __call__(self) -> None:
        module = self._module()
        assert module is not None
        redraw(module, self._inits)

    def __getstate__(self) -> tuple[nn.Module | None, dict[str, Init]]:
        return self._module(), self._inits

    def __setstate__(self, state: tuple[nn.Module, dict[str, Init]]) -> None:
        self._module, self._inits = weakref.ref(state[0]), state[1]


def _plain(module: nn.Module, name: str) -> bool:
    return name in module._parameters


def _write(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    value = value.to(old.device, old.dtype)
    if _plain(module, name):
        old.copy_(value)
        return
    hook = _hook(module, name)
    try:
        if parametrize.is_parametrized(module, name):
            setattr(module, name, value.clone())
        elif isinstance(hook, BasePruningMethod):
            _write(module, f"{name}_orig", value)
            value = value * getattr(module, f"{name}_mask").to(value.dtype)
        elif isinstance(hook, WeightNorm):
            _write(module, f"{name}_v", value)
            _write(module, f"{name}_g", torch.norm_except_dim(value, 2, hook.dim))
        elif hook is not None or _is_computed(module, name, old):
            raise ValueError("it is computed from other tensors" + (f" by {type(hook).__name__}" if hook else ""))
        else:
            old.copy_(value)
        _refresh(module, name)
        if not old.is_meta and not _close(getattr(module, name), value):
            raise ValueError("what computes it gives another value back")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot write {name} of {type(module).__name__}: {error}") from error


def _hook(module: nn.Module, name: str) -> Any:
    """What recomputes the tensor before every forward: prune, or the old weight_norm or spectral_norm; or None."""
    for hook in module._forward_pre_hooks.values():
        if name == getattr(hook, "_tensor_name", getattr(hook, "name", None)):
            return hook
    return None


@torch.no_grad()
def recomputed(module: nn.Module, name: str) -> Tensor | None:
    """What `module.<name>` will be in the next forward if a hook computes it; None if no hook does."""
    hook = _hook(module, name)
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(module)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    return hook.compute_weight(module) if isinstance(hook, WeightNorm) else None


def _refresh(module: nn.Module, name: str) -> None:
    """Brings what a hook computes up to date."""
    if (value := recomputed(module, name)) is not None:
        setattr(module, name, value)


def _is_computed(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether the tensor, which is no parameter, was made of others: by its graph, or by what is kept beside it."""
    beside = any(other.startswith(f"{name}_") for other in (*module._parameters, *module._buffers))
    return beside or tensor.grad_fn is not None


def _stores(module: nn.Module, name: str) -> list[Tensor]:
    """The tensors from which module.<name> is made."""
    if parametrize.is_parametrized(module, name):
        kept = module.get_submodule(f"parametrizations.{name}")
        return [*kept.parameters(), *kept.buffers()]
    beside = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [getattr(module, name), *(tensor for other, tensor in beside if other.startswith(f"{name}_"))]


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal but for the rounding of a norm and a division."""
    error, scale = (got.double() - want.double()).norm(), want.double().norm()
    return bool(error <= 16 * torch.finfo(want.dtype).eps * scale)
