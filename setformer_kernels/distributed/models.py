"""Whole models on shards of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..nn.reference_set import ReferenceSet
from . import agreement
from .context import build_cp_context
from .ranks import communicator, kind_of

Model = TypeVar("Model", bound=nn.Module)
SETTINGS = (
    *("num_references", "num_iters", "epsilon", "bandwidth", "kernel", "value_map", "position_dim", "key_relaxation"),
    *("reference_relaxation", "backend", "tol", "method", "grad", "training"),
)


def context_parallel(
    model: Model, mesh: Any, *, layout: str = "contiguous", lengths: Sequence[int] | None = None
) -> Model:
    """The model itself, whose SeT attention now takes its tokens as a shard of a sequence that lies on several ranks.

    Every rank calls this with the same model, and then the model with its own tokens.  What is not attention works
    token by token, but for the short convolution of `models.CausalDecoder`, which takes the tokens before a shard from
    other ranks; positions are what the caller gives: those of the whole sequence.  Gradients of parameters are each
    rank's part, which DDP or FSDP over these ranks average, as they do the ranks' losses.

    Args:
        mesh: a DeviceMesh of one dimension, or one that has a dimension "cp"; or a ProcessGroup.
        layout, lengths: as in `build_cp_context`.  None for mesh undoes it.

    Raises:
        ValueError: on every rank, where the model has no SeT attention, or parts that look at other tokens (attention
            that is not SeT, convolutions over tokens); where settings, dtypes or sizes of the ranks' modules differ.
    """
    modules = _reference_sets(model)
    context = None
    if mesh is not None:
        group = _of_dimension(mesh)
        facts = {f"{name}.{key}": value for name, module in modules.items() for key, value in _facts(module).items()}
        ranks = communicator(group, "mesh")
        agreement.agreed(ranks, {}, "context_parallel", _short(facts), lambda: _check(model, modules))
        context = build_cp_context(group=group, layout=layout, lengths=lengths)
    for module in model.modules():
        if hasattr(module, "cp_context"):
            vars(module)["cp_context"] = context
    return model


def _reference_sets(model: Any) -> dict[str, ReferenceSet]:
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name or "model": module for name, module in named if isinstance(module, ReferenceSet)}


def _of_dimension(mesh: Any) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh) or mesh.ndim == 1:
        return mesh
    if "cp" not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"mesh must have one dimension, or one that is called 'cp', got {mesh.mesh_dim_names}")
    return mesh["cp"]


def _facts(module: ReferenceSet) -> dict[str, Any]:
    settings = {name: getattr(module, name) for name in SETTINGS}
    return settings | {"references": f"{module.references.dtype} {list(module.references.shape)}"}


def _short(facts: dict[str, Any]) -> dict[str, Any]:
    """By setting, the modules' values one after another: once where all have the same."""
    by_setting: dict[str, list[str]] = {}
    for name, value in facts.items():
        by_setting.setdefault(name.rpartition(".")[2], []).append(str(value))
    return {
        name: f"{len(values)} × {values[0]}" if len(set(values)) == 1 else agreement.digest(values)
        for name, values in by_setting.items()
    }


def _check(model: Any, modules: dict[str, ReferenceSet]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {kind_of(model)}")
    if not modules:
        raise ValueError(f"model must have SeT attention, got {kind_of(model)} without")
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, ReferenceSet):
            raise ValueError(f"model must have no attention but SeT's, which sees the tokens of its rank alone: {name}")
        reaches = isinstance(module, _ConvNd) and len(module.kernel_size) == 1 and module.kernel_size[0] > 1
        if reaches and not hasattr(module, "cp_context"):
            raise ValueError(f"model must have no convolution over tokens, which ends at those of its rank: {name}")
    for name, own in modules.items():
        if own._converges():
            raise ValueError(f"tol, method and grad of {name} go without cp_context: it is to converge")
        if getattr(own, "bias_k", None) is not None or getattr(own, "add_zero_attn", False):
            raise ValueError(f"add_bias_kv and add_zero_attn of {name} go without cp_context: each rank would add them")
