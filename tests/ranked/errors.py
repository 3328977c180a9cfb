"""What bad meshes and DTensors get on several ranks.  Cases of tests/test_distributed.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import setformer_kernels.functional as SF
from setformer_kernels.distributed import build_cp_context, fully_shard


def case_a_release_whose_fsdp_has_no_cpu() -> None:
    """As torch 2.6: streams of the CPU there have no events to wait for."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.cpu.Stream, "record_event")
        with pytest.raises(ValueError, match=r"mesh must be of GPUs with torch .*: 2\.7's does"):
            fully_shard(nn.Linear(2, 2), mesh=mesh)
    with pytest.raises(ValueError, match="mesh must have names for its 2 dimensions"):
        fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (dist.get_world_size(), 1)))


def case_a_context_takes_the_tensors_of_a_rank() -> None:
    """On one rank a DTensor: all are told."""
    mesh, context = init_device_mesh("cpu", (dist.get_world_size(),)), build_cp_context()
    x = torch.randn(1, 2, 4, 8)
    whole = [distribute_tensor(t, mesh, [at]) for t, at in ((x, Shard(2)), (x[0], Replicate()))]
    given = [x, x, x, x[0]]
    for name, at, t in (("query", 0, whole[0]), ("references", 3, whole[1])):
        own = [*given[:at], t if dist.get_rank() == 1 else given[at], *given[at + 1 :]]
        with pytest.raises(TypeError, match=f"{name} must be this rank's own Tensor with cp_context"):
            SF.set_attention(*own, cp_context=context)
