"""SeTAttention from a memory of its keys, and with fewer key heads than query heads."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels import SeTAttention, SeTPooling

B, L, S, E, H, M = 2, 5, 9, 24, 4, 6
D = E // H
CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "widths": {"kdim": 10, "vdim": 12},
    "slots": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False},
    "rkhs": {"value_map": "rkhs", "learn_epsilon": True, "learn_log_mass": True},
    "placed": {"position_dim": 2, "add_zero_attn": True},
    "T": {"num_iters": 3, "reference_relaxation": 0.6},
}


def module_of(construction: str, **own: Any) -> SeTAttention:
    return SeTAttention(E, H, num_references=M, **CONSTRUCTIONS[construction], **own)


def tokens(module: SeTAttention, length: int, width: int, batched: bool = True) -> Tensor:
    x = torch.randn(B, length, width) if batched else torch.randn(length, width)
    return x if module.batch_first or not batched else x.transpose(0, 1)


def call_of(module: SeTAttention, batched: bool) -> tuple[list[Tensor], dict[str, Any], dict[str, Any]]:
    """query, key, value; what goes to the keys; what goes to the queries."""
    inputs = [tokens(module, n, w, batched) for n, w in ((L, E), (S, module.kdim), (S, module.vdim))]
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    keys: dict[str, Any] = {"key_padding_mask": padding if batched else padding[1]}
    queries = {}
    if module.position_dim:
        keys["key_position"], queries["query_position"] = torch.rand(S, 2), torch.rand(L, 2)
    return inputs, keys, queries


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("heads", [None, 2, 1])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_a_memory_stands_for_keys_and_values(construction: str, heads: int | None, batched: bool) -> None:
    module = module_of(construction, num_kv_heads=heads)
    (query, key, value), keys, queries = call_of(module, batched)
    output, _ = module(query, key, value, need_weights=False, **keys, **queries)
    memory = module.memory(key, value, **keys)
    assert memory.z.shape == (B if batched else 1, heads or H, M, D)
    found, weights = module(query, memory=memory, **queries)
    assert weights is None
    assert torch.equal(found, output)
    grads = [torch.autograd.grad(o.square().sum(), list(module.parameters())) for o in (found, output)]
    torch.testing.assert_close(*grads)


def widened(name: str, narrow: Tensor) -> Tensor:
    """A parameter of two key heads as one of four, the heads repeated."""
    if name in ("in_proj_weight", "in_proj_bias"):
        q, k, v = narrow.split((E, 2 * D, 2 * D))
        return torch.cat([q, widened("", k), widened("", v)])
    if name in ("bias_k", "bias_v"):
        return narrow.unflatten(-1, (2, D)).repeat_interleave(2, -2).flatten(-2)
    if name in ("", "k_proj_weight", "v_proj_weight"):
        return narrow.unflatten(0, (2, D)).repeat_interleave(2, 0).flatten(0, 1)
    return narrow.repeat_interleave(2, 0)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_fewer_key_heads_are_repeated_ones(construction: str) -> None:
    grouped, full = module_of(construction, num_kv_heads=2), module_of(construction)
    wide = {name: t.shape for name, t in full.state_dict().items()}
    state = grouped.state_dict().items()
    full.load_state_dict({name: t if t.shape == wide[name] else widened(name, t) for name, t in state})
    (query, key, value), keys, queries = call_of(grouped, batched=True)
    for average in (True, False):
        found = grouped(query, key, value, average_attn_weights=average, **keys, **queries)
        torch.testing.assert_close(found, full(query, key, value, average_attn_weights=average, **keys, **queries))
    if construction in ("plain", "slots", "no bias", "rkhs"):
        for options in ({"is_causal": True}, {"attn_mask": torch.rand(B * H, L, L) < 0.3}):
            found = grouped(query, query, query, need_weights=False, **options)[0]
            torch.testing.assert_close(found, full(query, query, query, need_weights=False, **options)[0])


def test_a_grouped_module_is_copied_pickled_shown_and_initialised() -> None:
    module = SeTAttention(E, H, num_references=M, num_kv_heads=2, add_bias_kv=True)
    assert module.in_proj_weight.shape == (E + 4 * D, E)
    assert (module.num_kv_heads, module.references.shape[0], module.bias_k.shape[-1]) == (2, 2, 2 * D)
    assert "num_heads=4, num_kv_heads=2" in repr(module)
    x = torch.randn(L, B, E)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x, x, x), module(x, x, x))
    module.initialize_references(torch.randn(S, B, E))
    before = module.in_proj_weight.clone()
    module.reset_parameters()
    assert not torch.equal(before, module.in_proj_weight)
    plain = SeTAttention(E, H, num_references=M)
    assert plain.key_heads == H
    assert "num_kv_heads" not in repr(plain)


def test_nested_keys_and_queries() -> None:
    module = module_of("batch_first")
    nested = [
        torch.nested.nested_tensor([torch.randn(n, E) for n in lengths], layout=torch.jagged)
        for lengths in ((3, 5), (4, 9))
    ]
    found, _ = module(nested[0], memory=module.memory(nested[1], nested[1]))
    wanted, _ = module(nested[0], nested[1], nested[1], need_weights=False)
    for one, other in zip(found.unbind(), wanted.unbind(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_memory_compiles_and_exports() -> None:
    module = module_of("batch_first", num_kv_heads=2).eval()
    query, key = torch.randn(B, L, E), torch.randn(B, S, E)
    memory = module.memory(key, key)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: module(q, memory=module.memory(k, k))[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), module(query, memory=memory)[0])

    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, query: Tensor, memory: SF.SetMemory) -> Tensor:
            return self.attention(query, memory=memory)[0]

    memory = SF.SetMemory(*(t.detach() for t in memory))
    n = torch.export.Dim("n", min=2, max=100)
    shapes = {"query": {1: n}, "memory": SF.SetMemory({}, {})}  # type: ignore[arg-type]
    exported = torch.export.export(Reader(), (query, memory), dynamic_shapes=shapes)
    longer = torch.randn(B, 17, E)
    torch.testing.assert_close(exported.module()(longer, memory), module(longer, memory=memory)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_memory_is_wide(dtype: torch.dtype) -> None:
    module = module_of("plain").to(dtype)
    memory = module.memory(torch.randn(S, B, E, dtype=dtype), torch.randn(S, B, E, dtype=dtype))
    assert memory.z.dtype == memory.g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert module(torch.randn(L, B, E, dtype=dtype), memory=memory)[0].dtype == dtype


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "key": {"key": torch.zeros(S, B, E)},
    "value": {"value": torch.zeros(S, B, E)},
    "key_padding_mask": {"key_padding_mask": torch.zeros(B, S, dtype=torch.bool)},
    "attn_mask": {"attn_mask": torch.zeros(L, S)},
    "key_position": {"key_position": torch.zeros(S, 2)},
    "is_causal": {"is_causal": True},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_a_memory_contradicts(name: str) -> None:
    module = SeTAttention(E, H, num_references=M)
    memory = module.memory(torch.randn(S, B, E), torch.randn(S, B, E))
    with pytest.raises(ValueError, match=f"memory stands for keys, values and their masks, got {name} as well"):
        module(torch.randn(L, B, E), memory=memory, **CONTRADICTIONS[name])


def test_other_errors() -> None:
    module = SeTAttention(E, H, num_references=M)
    key, query = torch.randn(S, B, E), torch.randn(L, B, E)
    memory = module.memory(key, key)
    with pytest.raises(TypeError, match="`key` must be a tensor, got NoneType"):
        module(query)
    with pytest.raises(TypeError, match="memory must be a SetMemory"):
        module(query, memory=memory.z)
    with pytest.raises(ValueError, match=r"memory.z must have shape \[3, \*, \*, \*\] \(B of the query"):
        module(torch.randn(L, 3, E), memory=memory)
    with pytest.raises(ValueError, match="query must have H, a multiple of the 3 heads of the memory"):
        module(query, memory=SF.SetMemory(memory.z[:, :3], memory.g[:, :3]))
    with pytest.raises(ValueError, match="expecting embedding dimension of 24, but got 23 in query"):
        module(query[..., 1:], memory=memory)
    with pytest.raises(ValueError, match="expecting embedding dimension of 24, but got 23 in key"):
        module.memory(key[..., 1:], key[..., 1:])
    with pytest.raises(ValueError, match="position_dim=2 needs key_position"):
        SeTAttention(E, H, position_dim=2).memory(key, key)
    for heads in (0, 3, 8):
        with pytest.raises(ValueError, match=f"num_kv_heads must divide num_heads, 4, got {heads}"):
            SeTAttention(E, H, num_kv_heads=heads)


SOLVED: dict[str, Any] = {"num_references": M, "num_iters": 100, "tol": 1e-5, "epsilon": 0.05}


@pytest.mark.parametrize("how", [{}, {"method": "newton", "grad": "implicit"}], ids=["sinkhorn", "newton"])
def test_a_memory_says_what_was_reached_and_begins_where_another_ended(how: dict[str, Any]) -> None:
    module, (key, value) = SeTAttention(E, H, num_kv_heads=2, **SOLVED, **how), torch.randn(2, S, B, E)
    memory, info = module.memory(key, value, return_info=True)
    assert torch.equal(memory.z, module.memory(key, value).z)
    assert info.converged.shape == (B, 2)
    assert info.converged.all()
    again, warm = module.memory(key, value, initial_potential=memory.g.detach(), return_info=True)
    assert (warm.iters < info.iters).all()
    torch.testing.assert_close(again, memory, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"initial_potential must have shape \[2, 2, 6\], got \[2, 4, 6\]"):
        module.memory(key, value, initial_potential=torch.zeros(B, H, M))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_pooling_says_what_was_reached_and_begins_where_another_ended(layout: torch.layout) -> None:
    module, x = SeTPooling(E, H, **SOLVED), torch.randn(B, S, E)
    pooled, info = module(x, return_info=True)
    assert torch.equal(pooled, module(x))
    assert info.converged.shape == (B, H)
    assert info.converged.all()
    _, warm = module(x, initial_potential=info.potential, return_info=True)
    assert (warm.iters < info.iters).all()
    sequences = torch.nested.nested_tensor(list(x), layout=layout)
    plain = SeTPooling(E, H, num_references=M)  # jagged ones are not padded, unless something is asked for
    found, reached = plain(sequences, return_info=True)
    torch.testing.assert_close(found, plain(x))
    torch.testing.assert_close(reached, plain(x, return_info=True)[1])
