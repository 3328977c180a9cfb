"""The CUDA kernel for logits that lie close together: when it runs, and that it stays within the error budget."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import pytest
import torch
from test_cuda_kernels import on_shim, shim
from test_cuda_layout import H100, devices
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.backends import cuda
from setformer_kernels.problem import SCALARS, Options
from setformer_kernels.testing import assert_within_budget, model_inputs
from setformer_kernels.testing.budget import cast

__all__ = ["devices", "on_shim", "shim"]  # fixtures

HALVES = [torch.bfloat16, torch.float16]


def tensors(b: int, s: int, length: int, m: int, d: int, e: int, heads: int = 1) -> dict[str, Tensor]:
    shapes = {
        "query": (b, heads, length, d),
        "key": (b, heads, s, d),
        "value": (b, heads, s, e),
        "references": (heads, m, d),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def names(shim: ModuleType) -> list[str]:
    """The kernels that were launched."""
    return [line.removeprefix("launch ") for line in shim.done() if line.startswith("launch ")]


# B, S, L, M, D, E: one block; fewer references, shorter rows; a cluster, some of whose blocks have no keys; more values
# than a block pools at a time; a block for several problems; queries alone ask for warps; one processor, whose block
# has 16 warps.
SHAPES = {"block": (1, 60, 33, 64, 64, 64), "short": (1, 70, 20, 50, 40, 24), "eight": (1, 1030, 300, 64, 64, 64),
          "empty_blocks": (1, 129, 2000, 64, 16, 8), "wide": (1, 90, 20, 64, 64, 200), "many": (300, 9, 9, 60, 64, 32),
          "few_keys": (2, 3, 100, 64, 64, 64), "alone": (1, 300, 270, 64, 64, 64)}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "t1": {"num_iters": 1}, "t0": {"num_iters": 0},
    "relaxed": {"key_relaxation": 0.8, "reference_relaxation": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("shape", "options"), [*((name, "plain") for name in SHAPES), *(("short", o) for o in OPTIONS)]
)
def test_within_the_error_budget_in_two_schedules(
    shape: str, options: str, dtype: torch.dtype, devices: ModuleType, on_shim: ModuleType, poisoned_memory: None
) -> None:
    b, s, *_ = SHAPES[shape]
    inputs = tensors(*SHAPES[shape])
    others = dict(OPTIONS[options])
    if options == "relaxed":
        others["key_mask"] = torch.rand(b, s) > 0.4
        inputs["reference_log_mass"] = torch.randn(1, SHAPES[shape][3], dtype=torch.float64)
    call = functools.partial(SF.set_attention, **{"num_iters": 3} | others)
    cotangent = torch.zeros(*inputs["query"].shape[:3], inputs["value"].shape[3], dtype=torch.float64)
    exact, model = model_inputs(functools.partial(call, backend="reference"), inputs, dtype, cotangent)
    found = []
    for schedule in ("warp descending", "any ascending"):  # test_cuda_barriers.py has all of them
        on_shim.set_devices([(1 if shape == "alone" else H100[0], H100[1], (0, 0, 0), False)])
        on_shim.set_schedule(schedule)
        found.append(call(**cast(inputs, torch.float32, dtype), backend="cuda"))
    assert names(on_shim) == ["attention_narrow"]
    assert torch.equal(*found)
    assert_within_budget({"output": found[0]}, *({"output": t["output"]} for t in (exact, model)), shape)


# Heads, S, L, M, D, E, processors, KiB of shared memory -> blocks of a head, which find a processor each all at a time.
CROWDS = {
    (2, 300, 270, 64, 64, 64, 8, 104): 2,
    (2, 560, 40, 50, 40, 200, 8, 224): 2,  # more values than are pooled at a time
    (2, 500, 20, 64, 64, 32, 8, 104): 4,
    (2, 1000, 20, 64, 64, 32, 16, 144): 8,
}


@pytest.mark.parametrize("masses", [False, True])
@pytest.mark.parametrize("crowd", CROWDS, ids=str)
def test_blocks_that_meet_in_device_memory_give_the_bits_of_clusters(
    crowd: tuple[int, ...], masses: bool, devices: ModuleType, on_shim: ModuleType, poisoned_memory: None
) -> None:
    (heads, s, length, m, d, e), device, blocks = crowd[:6], (crowd[6], crowd[7] * 1024), CROWDS[crowd]
    dtypes = {"references": torch.float32}
    given = {k: t.to(dtypes.get(k, HALVES[masses])) for k, t in tensors(1, s, length, m, d, e, heads).items()}
    x = cuda.Operands(**{k: given.get(k) for k in cuda.Operands._fields})
    if masses:
        mass = torch.where(torch.rand(1, heads, s) > 0.3, torch.randn(1, heads, s), -torch.inf)
        x = x._replace(log_a=mass.log_softmax(-1), log_b=torch.randn(heads, m).log_softmax(-1))
    options, found = Options((1.0, 0.05, 0.9, 0.8, 1.0), "rbf", 3), []
    room = tuple(heads if size <= blocks else 1 for size in (2, 4, 8))  # for clusters of so many blocks
    for at_once, schedule in ((room, "any ascending"), ((1, 1, 1), "block descending"), ((1, 1, 1), "any ascending")):
        on_shim.set_devices([(*device, at_once, True)])
        on_shim.set_schedule(schedule)
        found.append(cuda.attention(x, options))
        assert names(on_shim) == ["attention_narrow" if at_once == room else "attention_narrow_in_grid"]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


# Processors, clusters of 2 at a time, whether heads of two blocks have what their meeting in device memory needs.
ROOM = {(8, 1): True, (8, 2): False, (8, 0): False, (3, 1): False}


@pytest.mark.parametrize("room", ROOM, ids=str)
def test_blocks_meet_in_device_memory_where_their_clusters_would_take_turns(
    room: tuple[int, int], devices: ModuleType, on_shim: ModuleType
) -> None:
    processors, pairs = room
    given = {
        k: t.to(torch.float32 if k == "references" else torch.float16)
        for k, t in tensors(1, 300, 9, 64, 64, 64, 2).items()
    }
    on_shim.set_devices([(processors, 152 * 1024, (pairs, 1, 1), True)])
    SF.set_attention(**given, backend="cuda")
    assert names(on_shim) == ["attention_narrow_in_grid" if ROOM[room] else "attention_narrow"]


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "narrow": ("attention_narrow", {}),
    "wider_in_bfloat16": ("attention_narrow", {"epsilon": 0.03}),
    "too_wide": ("attention", {"epsilon": 0.01}),
    "unknown_epsilon": ("attention", {"epsilon": torch.tensor([0.05])}),
    "dot": ("attention", {"kernel": "dot"}),
    "dropout": ("attention", {"dropout_p": 0.5}),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_runs_where_the_range_is_known_to_be_narrow(name: str, devices: ModuleType, on_shim: ModuleType) -> None:
    kernel, options = CALLS[name]
    given = {k: t.bfloat16() if k != "references" else t.float() for k, t in tensors(1, 20, 20, 64, 64, 64).items()}
    on_shim.set_devices([(*H100, (0, 0, 0), False)])
    SF.set_attention(**given, **options, backend="cuda")
    assert names(on_shim) == [kernel]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strides_that_are_no_whole_16_bytes_take_the_other_kernel(
    dtype: torch.dtype, devices: ModuleType, on_shim: ModuleType
) -> None:
    given = {k: t.to(dtype) if k != "references" else t.float() for k, t in tensors(1, 20, 20, 64, 64, 64).items()}
    want = SF.set_attention(**given, backend="cuda")
    given["key"] = torch.cat([given["key"], given["key"][..., :1]], -1)[..., :64]  # rows of 65 numbers
    on_shim.set_devices([(*H100, (0, 0, 0), False)])
    found = SF.set_attention(**given, backend="cuda")
    assert names(on_shim) == ["attention"]
    assert (found - want).float().norm() <= 4 * torch.finfo(dtype).eps * want.float().norm()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pooled_values_and_column_sums(dtype: torch.dtype, on_shim: ModuleType) -> None:
    """z and c, which the backward starts from, as of the general kernel, which takes an ε that is a tensor."""
    given = {k: t.float() for k, t in tensors(2, 200, 1, 64, 64, 64).items() if k != "query"}
    given = {k: t if k == "references" else t.to(dtype) for k, t in given.items()}
    mask = torch.rand(2, 200) > 0.3
    mask[1] = False  # no key at all
    log_a = torch.where(mask, 0.0, -torch.inf).log_softmax(-1).nan_to_num(-torch.inf, neginf=-torch.inf)
    x = {k: given.get(k) for k in cuda.Operands._fields} | {"log_a": log_a[:, None]}
    options = Options(SCALARS, "rbf", 3)
    found = cuda.pool(cuda.Operands(**x), options)
    exact = cuda.pool(cuda.Operands(**x | {"epsilon": torch.tensor([0.05])}), options)
    assert torch.equal(found[1] == -torch.inf, exact[1] == -torch.inf)
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def test_masked_content_is_never_read(on_shim: ModuleType) -> None:
    given = {k: t.bfloat16() if k != "references" else t.float() for k, t in tensors(1, 40, 20, 64, 64, 64).items()}
    mask = torch.arange(40)[None] % 3 > 0
    want = SF.set_attention(**given, key_mask=mask, backend="cuda")
    given["key"][:, :, ::3], given["value"][:, :, ::3] = torch.nan, torch.inf
    assert torch.equal(SF.set_attention(**given, key_mask=mask, backend="cuda"), want)
