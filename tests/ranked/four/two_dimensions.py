"""Data and tensor parallelism at once.  Cases of tests/test_distributed.py, on four ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import setformer_kernels as sk

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import POLICIES, STEPS, agree, inputs_of, loss_of, optimizer_of, text_model, with_heads_apart


def case_two_dimensions() -> None:
    for policy in POLICIES:
        shape = (2, dist.get_world_size() // 2)
        one = text_model().double()
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        many = with_heads_apart(one, mesh["tp"])
        sk.distributed.fully_shard(many, mesh=mesh, mp_policy=policy)
        optimizer, reference = optimizer_of(many), optimizer_of(one)
        for step in range(STEPS):
            x, norms = inputs_of(one, step), []
            for model, o, part in ((one, reference, x), (many, optimizer, x.chunk(shape[0])[mesh.get_local_rank(0)])):
                o.zero_grad()
                loss_of(model, part).backward()
                norms.append(sk.distributed.clip_grad_norm_(model.parameters(), 0.05))
                o.step()
            torch.testing.assert_close(*norms)
        agree(one.state_dict(), sk.distributed.full_state_dict(many), 1e-9)
