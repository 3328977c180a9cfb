"""The ops on DTensors: sharded by batch and by heads they give what they give whole, forward and backward.
Cases of tests/test_distributed.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import setformer_kernels.functional as SF

B, H, L, S, D, E, M = 2, 4, 5, 7, 3, 6, 8
BATCH, HEADS, WHOLE = (Shard(0), Replicate()), (Shard(1), Shard(0)), (Replicate(), Replicate())


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64)

    return {
        "query": draw(B, H, L, D), "key": draw(B, H, S, D), "value": draw(B, H, S, E), "references": draw(H, M, D),
        "log_mass": draw(H, M), "epsilon": torch.rand(H, dtype=torch.float64) + 0.3,
        "mask": draw(B, S), "landmarks": draw(H, 6, E), "decay": -draw(B, H, S).abs(), "far": draw(L, S),
        "cost": draw(H, 4, 5), "tokens": draw(9, H, E), "ends": torch.tensor([0, 4, 4, 9]),
    }  # fmt: skip


def attention(x: dict[str, Any]) -> Any:
    return SF.set_attention(
        x["query"], x["key"], x["value"], x["references"], num_iters=2, reference_log_mass=x["log_mass"],
        epsilon=x["epsilon"], key_mask=x["mask"], backend="cpu",
    )  # fmt: skip


def weights(x: dict[str, Any]) -> Any:
    return SF.set_attention_weights(x["query"], x["key"], x["references"], epsilon=x["epsilon"], backend="cpu")


def pool(x: dict[str, Any]) -> Any:
    return SF.set_pool(x["key"], x["value"], x["references"], num_iters=2, backend="cpu")


def halves(x: dict[str, Any]) -> Any:
    memory = SF.set_transport(x["key"], x["value"], x["references"], num_iters=1, backend="cpu")
    return SF.set_read(x["query"], memory, x["references"], backend="cpu")


def causal(x: dict[str, Any]) -> Any:
    return SF.set_causal(x["key"], x["key"], x["value"], x["references"], log_decay=x["decay"], backend="cpu")[0]


def masked(x: dict[str, Any]) -> Any:
    return SF.set_attention(x["query"], x["key"], x["value"], x["references"], attn_mask=x["far"], backend="cpu")


def packed(x: dict[str, Any]) -> Any:
    rows = (x["tokens"][..., :D], x["tokens"][..., :D], x["tokens"])
    return SF.set_attention_varlen(*rows, x["references"], x["ends"], num_iters=2, backend="cpu")


def packed_pool(x: dict[str, Any]) -> Any:
    return SF.set_pool_varlen(x["tokens"][..., :D], x["tokens"], x["references"], x["ends"], backend="cpu")


def packed_causal(x: dict[str, Any]) -> Any:
    rows = (x["tokens"][..., :D], x["tokens"][..., :D], x["tokens"])
    how = {"causal": True, "output_final_state": True, "backend": "cpu"}
    return SF.set_attention_varlen(*rows, x["references"], x["ends"], **how)[0]


def features(x: dict[str, Any]) -> Any:
    return SF.nystrom_features(x["value"], x["landmarks"], center=True, backend="cpu")


def sinkhorn(x: dict[str, Any]) -> Any:
    return SF.sinkhorn(x["cost"], num_iters=3, backend="cpu")[0]


OPS = (attention, weights, pool, halves, causal, masked, features, sinkhorn, packed, packed_pool, packed_causal)
WITHOUT_BATCH = (sinkhorn, packed, packed_pool, packed_causal)
PER_TOKEN = ("query", "key", "value", "decay")
PER_HEAD = ("references", "log_mass", "epsilon", "landmarks", "cost")


def distributed(x: dict[str, Tensor], layout: tuple[Placement, Placement]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    at = {name: layout[0] if name in PER_TOKEN else layout[1] if name in PER_HEAD else Replicate() for name in x}
    if layout == BATCH:
        at["mask"] = Shard(0)
    if layout == HEADS:
        at["tokens"] = Shard(1)
    return {name: graded(distribute_tensor(t, mesh, [at[name]])) for name, t in x.items()}


def graded(t: Tensor) -> Tensor:
    return t.requires_grad_(t.is_floating_point())


def with_gradients(op: Callable[[dict[str, Any]], Any], x: dict[str, Any]) -> dict[str, Any]:
    y = op(x)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    if isinstance(y, DTensor):
        weight = distribute_tensor(weight, y.device_mesh, y.placements)
    y.backward(weight)
    return {"output": y.detach()} | {name: t.grad for name, t in x.items() if t.grad is not None}


def case_sharded_ops_and_their_gradients() -> None:
    for op in OPS:
        one = with_gradients(op, {name: graded(t) for name, t in inputs().items()})
        for layout in (HEADS, WHOLE) if op in WITHOUT_BATCH else (BATCH, HEADS, WHOLE):
            many = with_gradients(op, distributed(inputs(), layout))
            assert one.keys() == many.keys(), op.__name__
            assert many["output"].placements in ((layout[0],), (layout[1],)), (op.__name__, many["output"])
            for name, t in one.items():
                error = f"{op.__name__} {layout} {name}: {{}}".format
                torch.testing.assert_close(many[name].full_tensor(), t, msg=error)


def case_a_step_writes_its_states() -> None:
    x = inputs()
    q, k, v = x["key"][:, :, 0], x["key"][:, :, 0], x["value"][:, :, 0]
    _, state = SF.set_causal(x["key"], x["key"], x["value"], x["references"], output_final_state=True, backend="cpu")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for token, head in (BATCH, HEADS):
        whole, part = state.clone(), distribute_tensor(state, mesh, [token])
        given = [distribute_tensor(t, mesh, [token]) for t in (q, k, v)]
        references = distribute_tensor(x["references"], mesh, [head])
        with torch.no_grad():
            one = SF.set_step(whole, q, k, v, x["references"], backend="cpu")
            many = SF.set_step(part, *given, references, backend="cpu")
        torch.testing.assert_close(many.full_tensor(), one)
        torch.testing.assert_close(part.full_tensor(), whole)


def case_without_gradients() -> None:
    x = inputs()
    with torch.inference_mode():
        one, many = pool(x), pool({name: t.detach() for name, t in distributed(x, HEADS).items()})
    torch.testing.assert_close(many.full_tensor(), one)


def case_dropout_is_that_of_the_whole() -> None:
    x, seed = inputs(), torch.tensor(5)
    one = SF.set_attention(*list(x.values())[:4], dropout_p=0.4, seed=seed, backend="cpu")
    y = distributed(x, HEADS)
    mesh = y["query"].device_mesh
    seed = distribute_tensor(seed, mesh, [Replicate()])
    many = SF.set_attention(*list(y.values())[:4], dropout_p=0.4, seed=seed, backend="cpu")
    torch.testing.assert_close(many.full_tensor(), one)


def case_a_sharded_sequence_names_what_it_takes() -> None:
    x = distributed(inputs(), WHOLE)
    for name in ("query", "key"):
        part = {**x, name: x[name].detach().redistribute(placements=[Shard(2)])}
        with pytest.raises((ValueError, RuntimeError), match="cp_context"):
            attention(part)


def case_the_reference_needs_no_rule() -> None:
    x = distributed(inputs(), HEADS)
    y = SF.set_attention(x["query"], x["key"], x["value"], x["references"], backend="reference")
    plain = [t.full_tensor() for t in (x["query"], x["key"], x["value"], x["references"])]
    torch.testing.assert_close(y.full_tensor(), SF.set_attention(*plain, backend="reference"))
