"""Recipes on two ranks.  Cases of tests/models/test_ranks.py, in the folder where one process has trained already."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipe_helpers import fails_quietly, recipe
from test_ranks import ON_TWO, RUNS, evaluation

from setformer_kernels.recipes import segment


class Mean(Function):
    """Over ranks, each of which has part of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor) -> Tensor:
        return Mean.apply(d_mean)


class OverRanks(nn.BatchNorm2d):
    """The SyncBatchNorm that the recipe takes on GPUs, where alone torch has it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = Mean.apply(x.mean((0, 2, 3), keepdim=True))
        var = Mean.apply((x - mean).square().mean((0, 2, 3), keepdim=True))
        assert self.momentum is not None
        self.running_mean.lerp_(mean.detach().flatten(), self.momentum)
        self.running_var.lerp_(var.detach().flatten() * n / (n - 1), self.momentum)
        self.num_batches_tracked.add_(1)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def over_ranks(model: nn.Module, processes: Any) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = OverRanks
    return model


segment.with_one_norm = over_ranks


def case_training() -> None:
    for name, arguments in RUNS.items():
        recipe(*arguments, *ON_TWO.get(name, ON_TWO[""]), "--output", f"two/{name}")


def case_going_on_where_one_process_stopped() -> None:
    for name, arguments in RUNS.items():
        recipe(*arguments, *ON_TWO.get(name, ON_TWO[""]), "--output", f"from_one/{name}", "--resume")


def case_evaluation() -> None:
    for name in RUNS:
        recipe(*evaluation(name), *ON_TWO.get(name, [])[2:], "--output", f"evaluated/{name}")
    dist.barrier()


def case_parts_that_ranks_do_not_have() -> None:
    message = fails_quietly(*RUNS["lm"], "--context-parallel", 3, "--output", "none")
    assert "--context-parallel must divide the number of ranks, 2, got 3" in message
