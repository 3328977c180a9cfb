"""FSDP2 of models with SeT attention: under mixed precision references, masses and places stay in float32."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..nn.reference_set import ReferenceSet
from .of_rank import OfRank, become

# What a reference set has of its own, beside projections.
KEPT = ("references", "landmarks", "log_epsilon", "reference_log_mass", "reference_position", "position_scale")


class KeptOfRank(OfRank):
    """A reference set whose own parameters every rank has whole."""

    def initialize_references(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad(), self.locally():
            super().initialize_references(*args, **kwargs)  # type: ignore[misc]

    def memory(self, *args: Any, **kwargs: Any) -> Any:
        with self.locally():
            return super().memory(*args, **kwargs)  # type: ignore[misc]

    def packed(self, *args: Any, **kwargs: Any) -> Any:
        with self.locally():
            return super().packed(*args, **kwargs)  # type: ignore[misc]

    def weights(self, *args: Any, **kwargs: Any) -> Any:
        with self.locally():
            return super().weights(*args, **kwargs)  # type: ignore[misc]


def fully_shard(
    model: nn.Module, *, mesh: DeviceMesh, mp_policy: MixedPrecisionPolicy | None = None, **options: Any
) -> FSDPModule:  # fmt: skip
    """`torch.distributed.fsdp.fully_shard` of every block that has SeT attention in it, and of the model around them.

    A block is a member of an nn.ModuleList.  With a `param_dtype`, the references and what else transport is made of
    stay as they are: each rank has them whole (next to projections they are small), the gradients are averaged over
    ranks as FSDP averages, and tokens' places, which go into blocks, are not rounded.

    Args:
        mesh: of the ranks that share parameters, 1-D; of a model after `SeTParallel` the whole, with names, whose first
            dimension these ranks are.
        mp_policy, options: as torch's, for every block.

    Returns:
        the model.

    Raises:
        ValueError: a param_dtype with a release of torch whose fully_shard has no ignored_params, or a mesh of CPUs
            with torch 2.6, whose FSDP2 has GPUs alone; a mesh without names for its dimensions.
        TypeError: what is no mesh.
    """
    policy, dp = MixedPrecisionPolicy() if mp_policy is None else mp_policy, _dimension(mesh)
    if policy.param_dtype is not None:
        if "ignored_params" not in inspect.signature(torch_fully_shard).parameters:
            raise ValueError(f"mp_policy must have no param_dtype with torch {torch.__version__}, got {policy}")
        options["ignored_params"] = {*(options.get("ignored_params") or ()), *keep_whole(model, mesh)}
    inner = policy if policy.param_dtype is None else replace(policy, cast_forward_inputs=False)
    for block in blocks_of(model):
        torch_fully_shard(block, mesh=dp, mp_policy=inner, **options)
    return torch_fully_shard(model, mesh=dp, mp_policy=policy, **options)


def _dimension(mesh: DeviceMesh) -> DeviceMesh:
    """The dimension of ranks that share parameters, of a mesh that has been checked."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.device_type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(f"mesh must be of GPUs with torch {torch.__version__}, whose FSDP2 runs on no CPU: 2.7's does")
    if mesh.ndim == 1:
        return mesh
    if mesh.mesh_dim_names is None:
        raise ValueError(
            f"mesh must have names for its {mesh.ndim} dimensions, the first for ranks that share parameters"
        )
    return mesh[mesh.mesh_dim_names[0]]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:  # fmt: skip
    """`torch.nn.utils.clip_grad_norm_` of parameters on several meshes, which torch's refuses: a model whose heads are
    on several ranks has others on one.  Returns the norm of all gradients, a plain tensor, the same on every rank."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    gradients = [[parameter.grad for parameter in group] for group in groups.values()]
    norms = [get_total_norm([g for g in group if g is not None], norm_type) for group in gradients]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = get_total_norm(whole, norm_type, error_if_nonfinite)
    for mesh, group in groups.items():
        norm = total if mesh is None else DTensor.from_local(total, mesh, [Replicate()] * mesh.ndim, run_check=False)
        clip_grads_with_norm_(group, max_norm, norm)
    return total


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Innermost members of module lists in which there is a reference set."""

    def has(module: nn.Module) -> bool:
        return any(isinstance(inner, ReferenceSet) for inner in module.modules())

    members = [m for each in model.modules() if isinstance(each, nn.ModuleList) for m in each if has(m)]
    return [m for m in members if not any(other in members for other in m.modules() if other is not m)]


def keep_whole(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Replicates what transport is made of over the dimensions of the mesh along which it is not sharded."""
    kept: set[nn.Parameter] = set()
    for module in list(model.modules()):
        if isinstance(module, ReferenceSet):
            of_rank = module if isinstance(module, OfRank) else become(module, KeptOfRank, mesh)
            for name in KEPT:
                if (old := module._parameters.get(name)) is not None:
                    parameter = everywhere(old, mesh)
                    module.register_parameter(name, parameter)
                    of_rank.summed = {**of_rank.summed, name: averaged(copies(parameter))}
                    kept.add(parameter)
    return kept


def everywhere(old: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """The parameter on the whole mesh."""
    at: list[Placement] = [Replicate()] * mesh.ndim
    if isinstance(old, DTensor):
        assert mesh.mesh_dim_names is not None
        for name, placement in zip(old.device_mesh.mesh_dim_names or (), old.placements, strict=True):
            at[mesh.mesh_dim_names.index(name)] = placement
    local = old.to_local() if isinstance(old, DTensor) else old
    return nn.Parameter(DTensor.from_local(local.detach(), mesh, at, run_check=False), old.requires_grad)


def copies(parameter: Any) -> int:
    """How many ranks have the same part."""
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return int(torch.tensor([size for size, at in sizes if isinstance(at, Replicate)]).prod())


def averaged(ranks: int) -> Callable[[Tensor], Tensor]:
    """The identity, whose gradients are summed over so many ranks and shall be their mean."""

    def part(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient / ranks)
        return x

    return part
