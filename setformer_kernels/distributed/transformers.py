"""Styles of transformers' tensor parallelism, by which `tp_plan` names SeT attention and the MLP beside it.

transformers builds models without weights, distributes them by the plan, and reads of each file what a rank holds: so
parameters keep the names that they are saved under, and packed ones are sharded strided, which its loader reads.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    RowwiseParallel,
    TensorParallelLayer,
)

from ..nn import SeTAttention
from ..nn.reference_set import ReferenceSet
from .of_rank import OfRank
from .tensor_parallel import AttentionOfRank, SeTParallel

ATTENTION, MLP = "setformer", "setformer_mlp"  # the styles


class Named(SeTParallel):
    """`SeTParallel` that cuts no parameter and reads no values, of which there are none yet."""

    src_data_rank = None

    def _attention(self, module: SeTAttention, mesh: DeviceMesh) -> None:
        if module.key_heads != module.num_heads:
            raise ValueError(
                f"tp_plan: SeTAttention must have as many key heads as heads, {module.num_heads}, got"
                f" {module.key_heads}: use setformer_kernels.distributed.SeTParallel after loading"
            )
        packed: Placement = _StridedShard(0, split_factor=3)
        at = {"bias_k": Shard(2), "bias_v": Shard(2), "in_proj_weight": packed, "in_proj_bias": packed}
        self._by_rows(module, mesh, AttentionOfRank, at)

    def _packed(self, child: nn.Module, parts: int, mesh: DeviceMesh) -> None:
        strided = _StridedShard(0, split_factor=parts)
        self._by_rows(child, mesh, OfRank, dict.fromkeys(("weight", "bias"), strided))
        self._narrow(child, mesh)

    def _columns(self, child: nn.Module, mesh: DeviceMesh) -> None:
        distribute(child, RowwiseParallel(), mesh)
        child.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))  # what transformers takes it to be


def distribute(module: nn.Module, style: Any, mesh: DeviceMesh) -> None:
    for name in dict(module.named_parameters(recurse=False)):
        style.shard_param(module, name, mesh)
    style.install_forward(module, mesh)


class AttentionLayer(TensorParallelLayer):
    """Everything of a module of SeT attention, its children included."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return Named(input_layouts=Replicate())._apply(module, mesh)


class MlpLayer(TensorParallelLayer):
    """`models.layers.Mlp`: hidden units on several ranks."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        first, second = (child for child in module.children() if isinstance(child, nn.Linear))
        distribute(first, ColwiseParallel(), mesh)
        distribute(second, RowwiseParallel(), mesh)
        return module


ALL_PARALLEL_STYLES.register(ATTENTION, AttentionLayer())
ALL_PARALLEL_STYLES.register(MLP, MlpLayer())


def plan_of(blocks: str) -> dict[str, str]:
    """The plan of blocks with an `attention` and an `mlp`."""
    return {f"{blocks}.attention": ATTENTION, f"{blocks}.mlp": MLP}


def name_transports(model: Any) -> None:
    """Adds to the plan of a converted model, if it has one, what took the place of its softmax."""
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    if not getattr(model, "_tp_plan", None):
        return
    for name, module in model.named_modules():
        if isinstance(getattr(module, "set_transport", None), ReferenceSet):
            model._tp_plan[replace_layer_number_by_wildcard(f"{name}.set_transport")] = ATTENTION
