"""What processes of torch.distributed are asked for by tests/test_context_parallel_processes.py, all in one start.

    python ranks_processes.py RANK SIZE FOLDER: writes FOLDER/RANK.json, name -> "" or what went wrong.

Every process has the whole problem, and compares what it got for its tokens with what one process gets for all.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_helpers import rows_of, uneven
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels import SeTAttention, distributed

PATIENCE = 20  # seconds until a collective gives up
B, H, N, M, D, E = 2, 3, 44, 5, 8, 6
Case = Callable[[int, int], None]


def problem() -> dict[str, Tensor]:
    torch.manual_seed(3)
    shapes = {"query": (B, H, N, D), "key": (B, H, N, D), "value": (B, H, N, E), "references": (H, M, D)}
    return {name: torch.randn(*s, dtype=torch.float64, requires_grad=True) for name, s in shapes.items()}


def compare(rank: int, size: int, function: Any, layout: str = "contiguous", **options: Any) -> None:
    """Outputs and gradients on this rank's tokens; those of the references after a sum over the ranks."""
    given, lengths = problem(), uneven(N, size, 2 if layout == "zigzag" else 1)
    wanted = function(**given, **options)
    cotangent = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, [*given.values()], cotangent)
    rows = rows_of(lengths, layout)[rank]
    context = distributed.build_cp_context(layout=layout, lengths=lengths)
    own = {n: (t if n == "references" else t[:, :, rows]).detach().requires_grad_() for n, t in given.items()}
    found = function(**own, **options, cp_context=context)
    mine = torch.autograd.grad(found, [*own.values()], cotangent[:, :, rows])
    dist.all_reduce(mine[-1])
    torch.testing.assert_close(found, wanted[:, :, rows], rtol=1e-11, atol=1e-11)
    for one, other in zip(mine[:-1], grads[:-1], strict=True):
        torch.testing.assert_close(one, other[:, :, rows], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(mine[-1], grads[-1], rtol=1e-9, atol=1e-11)


def attention(rank: int, size: int) -> None:
    for T in (0, 1, 3):
        compare(rank, size, SF.set_attention, num_iters=T)
    compare(rank, size, SF.set_attention, num_iters=2, backend="reference")


def dropout(rank: int, size: int) -> None:
    compare(rank, size, SF.set_attention, "zigzag", dropout_p=0.3, seed=torch.tensor(7))


def scan(rank: int, size: int) -> None:
    for layout in ("contiguous", "zigzag"):
        compare(rank, size, SF.set_attention, layout, causal=True)


def repeats(rank: int, size: int) -> None:
    """The same bits on all ranks, and again."""
    given, context = problem(), distributed.build_cp_context()
    keys = {n: t[:, :, rank::size] if n != "references" else t for n, t in given.items() if n != "query"}
    pooled = [SF.set_pool(**keys, num_iters=3, cp_context=context).detach() for _ in range(2)]
    everybody = [torch.empty_like(pooled[0]) for _ in range(size)]
    dist.all_gather(everybody, pooled[0].contiguous())
    assert all(torch.equal(one, pooled[1]) for one in everybody)


def groups(rank: int, size: int) -> None:
    """A mesh of one dimension, and one dimension of a mesh of two."""
    from torch.distributed.device_mesh import init_device_mesh

    flat = init_device_mesh("cpu", (size,), mesh_dim_names=("ranks",))
    square = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "cp"))
    x = torch.randn(1, 6, 8)
    for mesh, n in ((flat, size), (square["cp"], 2)):
        context = distributed.build_cp_context(group=mesh)
        assert context.size == n
    model = distributed.context_parallel(SeTAttention(8, 2, batch_first=True, num_references=3), square)
    assert model.cp_context.size == 2
    model(x, x, x, need_weights=False)
    with pytest.raises(ValueError, match="group must be a mesh of one dimension"):
        distributed.build_cp_context(group=square)
    with pytest.raises(ValueError, match="mesh must have one dimension, or one that is called 'cp'"):
        distributed.context_parallel(model, init_device_mesh("cpu", (size // 2, 2)))


def disagreement(rank: int, size: int) -> None:
    """A setting of one rank, told to all."""
    given, context = problem(), distributed.build_cp_context()
    own = {n: t[:, :, rank::size] if n != "references" else t for n, t in given.items()}
    for name, options in (("num_iters", {"num_iters": 2 + (rank == 1)}), ("epsilon", {"epsilon": 1.0 - (rank == 1)})):
        with pytest.raises(ValueError, match=name):
            SF.set_attention(**own, **options, cp_context=context)
    torch.manual_seed(rank)
    with pytest.raises(ValueError, match="seed must be the same on all ranks"):
        distributed.build_cp_context()


def foreign_context(rank: int, size: int) -> None:
    """torch's own context_parallel, of softmax attention alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    module, x = SeTAttention(8, 2, batch_first=True, num_references=3), torch.randn(1, 4 * size, 8)
    inside = context_parallel(init_device_mesh("cpu", (size,)), buffers=[x], buffer_seq_dims=[1])
    with inside, pytest.raises(RuntimeError, match=r"distributed\.context_parallel"):
        module(x, x, x, need_weights=False)
    module(x, x, x, need_weights=False)


def killed(rank: int, size: int) -> None:
    """The last rank dies in a pass; the others' next collective ends."""
    given, context = problem(), distributed.build_cp_context()
    own = {n: t[:, :, rank::size] if n != "references" else t for n, t in given.items()}
    SF.set_attention(**own, cp_context=context)
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        SF.set_attention(**own, cp_context=context)
    assert time.monotonic() - begin < 2 * PATIENCE


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (attention, dropout, scan, repeats, groups, disagreement, foreign_context, killed)
}  # fmt: skip


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
    found: dict[str, str] = {}
    for name, case in CASES.items():
        try:
            case(rank, size)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a group without its last rank does not end by itself


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
