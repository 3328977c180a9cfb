"""What bad input gets over ranks: an error that names the argument, on every rank alike, and nobody waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import setformer_kernels.functional as SF
from setformer_kernels import SeTAttention
from setformer_kernels.distributed import (
    Ranks,
    SeTParallel,
    agreement,
    build_cp_context,
    clip_grad_norm_,
    context_parallel,
    fully_shard,
)

H, M, D = 2, 4, 8


def told(function: Any, *kinds: type) -> list[str]:
    """What both ranks raise, where the second has a bad argument."""
    errors = Ranks(2).run(function, raising=False)
    assert [type(error) for error in errors] == list(kinds), errors
    return [str(error) for error in errors]


def call(group: Any, function: Any, tokens: Any = None, **options: Any) -> None:
    context = build_cp_context(group=group)
    x = torch.randn(1, H, 4, D) if tokens is None else tokens
    keys = (x, x) if function is not SF.set_attention else (x, x, x)
    function(*keys, torch.randn(H, M, D), cp_context=context, **options)


@pytest.mark.parametrize("function", [SF.set_attention, SF.set_pool])
@pytest.mark.parametrize("options", [{"tol": -1.0}, {"method": "fast"}, {"grad": 3}], ids=str)
def test_what_goes_without_a_context_on_one_rank(function: Any, options: dict[str, Any]) -> None:
    """Whatever is wrong with it besides."""
    (name,) = options
    for message in told(lambda g: call(g, function, **(options if g.rank else {})), ValueError, ValueError):
        assert f"{name} " in message


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tokens_on_one_rank(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(H, 3, D), torch.randn(H, 3, D)], layout=layout)
    for message in told(lambda g: call(g, SF.set_attention, nested if g.rank else None), TypeError, TypeError):
        assert "query must be a dense Tensor" in message


def test_shards_whose_queries_are_not_those_of_their_keys() -> None:
    def live(group: Any) -> None:
        context = build_cp_context(group=group)
        q, k = torch.randn(1, H, 4 + group.rank, D), torch.randn(1, H, 4, D)
        SF.set_attention(q, k, k, torch.randn(H, M, D), causal=True, cp_context=context)

    for message in told(live, ValueError, ValueError):
        assert "query must have shape" in message


def test_offsets_of_the_wrong_kind_on_one_rank() -> None:
    cu = torch.tensor([0, 3, 8])
    for bad, kind in ((cu.bfloat16(), TypeError), (cu[None], ValueError), (3, TypeError)):
        for message in told(lambda g, bad=bad: build_cp_context((cu, bad)[g.rank], g), kind, kind):
            assert "cu_seqlens" in message


def test_an_error_of_any_kind_is_told_to_all() -> None:
    def live(group: Any) -> None:
        def check() -> None:
            if group.rank == 1:
                raise KeyError("a rank's own fault")

        agreement.agreed(group, {}, "call", {}, check)

    first, second = told(live, RuntimeError, KeyError)
    assert second in first
    assert "rank 1" in first


def test_arguments_of_the_wrong_type() -> None:
    for message in told(lambda g: build_cp_context(group=g, lengths=(5, {4, 5})[g.rank]), TypeError, TypeError):
        assert "lengths must be a sequence of ints" in message
    for message in told(lambda g: context_parallel((SeTAttention(8, 2), 3)[g.rank], g), TypeError, TypeError):
        assert "model must be an nn.Module, got int" in message
    with pytest.raises(ValueError, match=r"mesh must be one of torch\.distributed, which is not initialised, got str"):
        context_parallel(SeTAttention(8, 2), "cp")
    with pytest.raises(ValueError, match="n must be ≥ 1, got 0"):
        Ranks(0)
    with pytest.raises(TypeError, match="output_layouts must be a Placement or None, got str"):
        SeTParallel(output_layouts="replicate")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got str"):
        fully_shard(nn.Linear(2, 2), mesh="dp")  # type: ignore[arg-type]


def test_the_norm_of_one_tensor() -> None:
    tensors = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for t in tensors:
        t.grad = torch.arange(3.0)
    norms = clip_grad_norm_(tensors[0], 1.0), torch.nn.utils.clip_grad_norm_(tensors[1], 1.0)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(tensors[0].grad, tensors[1].grad)
