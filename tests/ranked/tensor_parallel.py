"""Tensor parallelism: what one process gives, within rounding.  Cases of tests/test_distributed.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import setformer_kernels as sk
from setformer_kernels import SeTAttention, SeTPooling
from setformer_kernels.models import CausalDecoder, CausalLM, SeTformer, TextEncoder
from setformer_kernels.models.causal import CausalAttention
from setformer_kernels.models.transport import SetTransport

B, L, S, E, H, M = 2, 5, 9, 24, 4, 6
PLACED = {"position_dim": 2, "learn_epsilon": True, "learn_log_mass": True, "value_map": "rkhs", "num_iters": 2}


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def parallel(module: nn.Module, plan: Any = None) -> nn.Module:
    """A copy with its heads on all ranks."""
    return parallelize_module(
        copy.deepcopy(module), mesh_of_all(), sk.distributed.SeTParallel() if plan is None else plan
    )


def full(module: nn.Module, of: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Of every parameter, as one process names them, something that is a tensor like it."""
    found = copy.copy(module)
    values = {name: of(p) for name, p in module.named_parameters()}
    found.state_dict = lambda: {n: v for n, v in values.items() if v is not None}  # type: ignore[method-assign]
    return sk.distributed.full_state_dict(found)


def agree(one: dict[str, Tensor], many: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert one.keys() == many.keys(), one.keys() ^ many.keys()
    for name, x in one.items():
        error = (x - many[name]).norm() / (x.norm() + 1e-30)
        assert torch.isfinite(x).all()
        assert error <= tolerance, (name, float(error))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return full(module, lambda p: p.grad)


def check(one: nn.Module, many: nn.Module, call: Callable[[nn.Module, list[Tensor]], Any], *inputs: Tensor) -> None:
    """Outputs, gradients of inputs and parameters, and what three steps of AdamW make of them."""
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (one, many)]
    for _ in range(3):
        found = []
        for module, optimizer in zip((one, many), optimizers, strict=True):
            optimizer.zero_grad()
            given = [x.clone().requires_grad_() for x in inputs]
            outputs = [o for o in call(module, given) if o is not None]
            weights = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
            sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
            found.append({f"output {i}": o.detach() for i, o in enumerate(outputs)})
            found[-1] |= {f"input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
        agree(*found)
        agree(gradients(one), gradients(many))
        for optimizer in optimizers:
            optimizer.step()
    agree(full(one, lambda p: p.detach()), full(many, lambda p: p.detach()))


def tokens(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


def attention(**own: Any) -> SeTAttention:
    module = SeTAttention(E, H, num_references=M, dtype=torch.float64, **{"batch_first": True, **own})
    for p in module.parameters():  # biases begin at zero, masses uniform
        p.data += 0.1 * torch.randn_like(p)
    return module


def self_attention(module: nn.Module, given: list[Tensor]) -> Any:
    return module(given[0], given[0], given[0])


def cross_attention(module: nn.Module, given: list[Tensor]) -> Any:
    return module(*given, need_weights=False)


def case_self_attention_with_weights() -> None:
    one = attention()
    check(one, parallel(one), self_attention, tokens(B, L, E))


def case_cross_attention_of_grouped_queries_and_slots() -> None:
    one = attention(num_kv_heads=2, add_bias_kv=True, add_zero_attn=True, kdim=10, vdim=12, batch_first=False)
    check(one, parallel(one), cross_attention, tokens(L, B, E), tokens(S, B, 10), tokens(S, B, 12))


def case_masks_of_heads_and_weights_of_heads() -> None:
    one = attention(bias=False)
    padding = torch.zeros(B, L, dtype=torch.float64)
    padding[0, 2] = -torch.inf
    mask = tokens(B * H, L, L).masked_fill(torch.rand(B * H, L, L) < 0.2, -torch.inf)
    mask.diagonal(0, 1, 2).zero_()
    how = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": False}
    check(one, parallel(one), lambda m, x: m(x[0], x[0], x[0], **how), tokens(B, L, E))


def case_masks_with_gradients() -> None:
    one = attention(num_iters=3)
    check(one, parallel(one), lambda m, x: m(x[0], x[0], x[0], x[1], False), tokens(B, L, E), tokens(B, L))


def case_everything_that_is_per_head() -> None:
    one, where = attention(**PLACED), torch.rand(L, 2)
    places = {"query_position": where, "key_position": where}
    check(one, parallel(one), lambda m, x: m(x[0], x[0], x[0], **places), tokens(B, L, E))


def case_causal_and_unbatched() -> None:
    one = attention()
    check(one, parallel(one), lambda m, x: m(x[0], x[0], x[0], need_weights=False, is_causal=True), tokens(B, L, E))
    check(one, parallel(one), self_attention, tokens(L, E))


def case_memories_are_of_the_heads_of_a_rank() -> None:
    one = attention()
    many, rank, ranks = parallel(one), dist.get_rank(), dist.get_world_size()
    x, keys = tokens(B, L, E), tokens(B, S, E)
    whole, part = one.memory(keys, keys), many.memory(keys, keys)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a.chunk(ranks, 1)[rank], b)
    check(one, many, lambda m, x: m(x[0], memory=m.memory(x[1], x[1])), x, keys)


def case_jagged_tokens() -> None:
    one = attention()
    many, rows = parallel(one), tokens(7, E)

    def call(module: nn.Module, given: list[Tensor]) -> Any:
        x = torch.nested.nested_tensor_from_jagged(given[0], offsets=torch.tensor([0, 3, 3, 7]))
        return [module(x, x, x, need_weights=False)[0].values()]

    check(one, many, call, rows)


def case_pooling() -> None:
    one = SeTPooling(E, H, num_references=M, dtype=torch.float64, **{**PLACED, "position_dim": 0})
    check(one, parallel(one), lambda m, x: [m(x[0])], tokens(B, S, E))


def case_transport_of_heads() -> None:
    one = SetTransport(2, 6, tokens(1), {"num_references": M, "learn_epsilon": True})
    many, rank = parallel(one), dist.get_rank()
    q, k, v = tokens(B, 4, L, 6), tokens(B, 2, S, 6), tokens(B, 2, S, 6)
    heads = [x.chunk(dist.get_world_size(), 1)[rank] for x in (q, k, v)]
    torch.testing.assert_close(many(*heads), one(q, k, v).chunk(dist.get_world_size(), 1)[rank])


def case_causal_attention_and_its_states() -> None:
    one = CausalAttention(E, H, num_references=M).double()
    one.gate.weight.data.normal_()
    many = parallel(one)
    check(one, many, lambda m, x: [m(x[0])[0]], tokens(B, L, E))
    x, outputs = tokens(B, L, E), []
    with torch.no_grad():
        for module in (one, many):
            first, past = module(x[:, :3], need_past=True)
            second, past = module(x[:, 3:4], past=past, need_past=True)
            outputs.append({"y": torch.cat((first, second, module(x[:, 4:], past=past)[0]), 1)})
            assert past.sums.shape[1] == module.num_heads
    agree(*outputs)


def plan_of(blocks: str) -> dict[str, Any]:
    """For the blocks of the package's models."""
    styles = {
        "attention": sk.distributed.SeTParallel(), "mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()
    }  # fmt: skip
    return {f"{blocks}.*.{name}": style for name, style in styles.items()}


def case_models_of_images_texts_and_languages() -> None:
    image = SeTformer((8, 16, 16, 32), (1, 1, 1, 1), (2, 2, 4, 4), num_references=M, num_classes=3, pool="set").double()
    text = TextEncoder(50, 16, 2, 4, 32, num_references=M, dropout=0.0).double()
    language = CausalLM(CausalDecoder(50, 16, 2, 4, 32, num_references=M)).double()
    ids = torch.randint(50, (B, L))
    plan = plan_of("stages.*.blocks") | {"head.pool": sk.distributed.SeTParallel()}
    check(image, parallel(image, plan), lambda m, x: [m(x[0])], tokens(B, 3, 64, 64))
    check(text, parallel(text, plan_of("blocks")), lambda m, x: [m(ids)])
    check(language, parallel(language, plan_of("decoder.blocks")), lambda m, x: [m(ids)])


def case_state_dicts_go_both_ways() -> None:
    one, other = attention(num_kv_heads=2), attention(num_kv_heads=2)
    pool, other_pool = SeTPooling(E, H, num_references=M), SeTPooling(E, H, num_references=M)
    for module, target in ((one, other), (pool, other_pool)):
        many = parallel(target)
        many.load_state_dict(module.state_dict())
        found = sk.distributed.full_state_dict(many)
        assert found.keys() == module.state_dict().keys()
        assert all(torch.equal(x, found[name]) for name, x in module.state_dict().items())
        target.load_state_dict(found)
        again = parallel(copy.deepcopy(target))
        again.load_state_dict(many.state_dict())  # of as many ranks, without gathering
        assert all(isinstance(p, DTensor) for p in again.parameters())


def case_every_rank_drops_other_weights() -> None:
    one = attention(dropout=0.5)
    many, x = parallel(one), tokens(B, L, E)
    calls = []
    for _ in range(2):
        torch.manual_seed(3)
        calls.append(many(x, x, x)[1])
    assert torch.equal(*calls)
    torch.manual_seed(3)
    by_head = many(x, x, x, average_attn_weights=False)[1]
    assert not torch.allclose(*(h == 0 for h in by_head.chunk(2, 1)))
    many.eval()
    torch.testing.assert_close(many(x, x, x)[0], one.eval()(x, x, x)[0])


def case_references_are_placed() -> None:
    one = attention(value_map="rkhs")
    many, x = parallel(one), tokens(B, 20, E)
    many.initialize_references(x)
    found = sk.distributed.full_state_dict(many)
    assert not torch.allclose(found["references"], one.references)
    torch.testing.assert_close(found["references"].norm(dim=-1), torch.ones(H, M, dtype=torch.float64))


def case_layouts_of_a_sharded_sequence() -> None:
    one, mesh = attention(), mesh_of_all()
    style = sk.distributed.SeTParallel(input_layouts=Shard(1), output_layouts=Shard(1))
    many = parallelize_module(copy.deepcopy(one), mesh, style)
    x = tokens(B, 6, E)
    part = x.chunk(2, 1)[dist.get_rank()]
    found = many(part, part, part, need_weights=False)[0]
    torch.testing.assert_close(found, one(x, x, x)[0].chunk(2, 1)[dist.get_rank()])
    whole = DTensor.from_local(x, mesh, [Replicate()])
    torch.testing.assert_close(many(whole, whole, whole)[0], found)


def case_without_gradients() -> None:
    one = attention()
    many, x = parallel(one), tokens(B, L, E)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for found, wanted in zip(self_attention(many, [x]), self_attention(one, [x]), strict=True):
                torch.testing.assert_close(found, wanted)


def case_compiled_in_one_graph() -> None:
    one = attention()
    many = parallel(one)
    compiled = torch.compile(many, fullgraph=True, backend="aot_eager")
    x = tokens(B, L, E)
    found = compiled(x, x, x, need_weights=False)[0], one(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(*found)
    for y in found:
        y.square().sum().backward()
    agree(gradients(one), gradients(many))


def case_refusals() -> None:
    for module, word in (
        (SeTAttention(9, 3), "num_heads"), (attention(num_kv_heads=1), "num_kv_heads"), (nn.Linear(2, 2), "Linear"),
        (SetTransport(3, 2, tokens(1), {}), "num_kv_heads"), (parallel(attention()), "OfRank"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            parallel(module) if "OfRank" not in word else parallelize_module(
                module, mesh_of_all(), sk.distributed.SeTParallel()
            )
    many = parallel(attention())
    state = attention().state_dict() | dict(many.state_dict())
    with pytest.raises((ValueError, RuntimeError), match="in_proj_weight"):
        many.load_state_dict(state)
