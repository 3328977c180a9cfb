"""timm's attention classes that are written with a call of `F.scaled_dot_product_attention`, replaced as they stand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

timm = pytest.importorskip("timm")
from timm.layers import attention, attention2d, diff_attention  # noqa: E402
from timm.models import beit, eva, hiera, nest, swin_transformer, twins, vision_transformer_sam, xcit  # noqa: E402

from setformer_kernels import functional as SF  # noqa: E402
from setformer_kernels.models import initialize_references, replace_attention  # noqa: E402

OWN = {"num_references": 6, "num_iters": 2}
SIDE, WIDTH = 4, 32


def tokens(n: int = SIDE * SIDE, batch: int = 3) -> Tensor:
    return torch.randn(batch, n, WIDTH)


# What builds a module, and what it is called with.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "rope": (
        lambda: attention.AttentionRope(WIDTH, 4, qkv_fused=False, num_kv_heads=2, num_prefix_tokens=1),
        lambda: (tokens(17), torch.randn(16, 16)),
    ),
    "eva": (lambda: eva.EvaAttention(WIDTH, 4, scale_norm=False, num_prefix_tokens=0), lambda: (tokens(),)),
    "beit": (lambda: beit.Attention(WIDTH, 2, window_size=(SIDE, SIDE)), lambda: (tokens(17),)),
    "swin": (
        lambda: swin_transformer.WindowAttention(WIDTH, 4, window_size=SIDE),
        lambda: (tokens(batch=6), torch.zeros(2, 16, 16).masked_fill(torch.rand(2, 16, 16) < 0.3, -100.0)),
    ),
    "windows beside heads": (lambda: twins.LocallyGroupedAttn(WIDTH, 4, ws=2), lambda: (tokens(), (SIDE, SIDE))),
    "windows behind heads": (
        lambda: hiera.MaskUnitAttention(WIDTH, WIDTH, 2, q_stride=2, window_size=4, use_mask_unit_attn=True),
        lambda: (tokens(),),
    ),
    "blocks": (lambda: nest.Attention(WIDTH, 4), lambda: (torch.randn(2, 5, 8, WIDTH),)),
    "heads in the batch": (
        lambda: vision_transformer_sam.Attention(WIDTH, 4, use_rel_pos=True, input_size=(SIDE, SIDE)),
        lambda: (torch.randn(2, SIDE, SIDE, WIDTH),),
    ),
    "one key head": (
        lambda: attention2d.MultiQueryAttention2d(WIDTH, num_heads=4, key_dim=8, value_dim=6, kv_stride=2),
        lambda: (torch.randn(2, WIDTH, SIDE, SIDE),),
    ),
}


def built(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    make, given = CASES[name]
    return make().eval(), given()


def replaced(module: nn.Module) -> nn.Module:
    report = replace_attention(nn.ModuleDict({"attention": module}), **OWN)
    assert list(report.replaced) == ["attention"], str(report)
    return module


def by_loops(references: Tensor, windows_first: bool) -> Callable[..., Tensor]:
    """What a call of softmax attention becomes, a window at a time."""

    def answer(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        if q.dim() == 5:
            at = 1 if windows_first else 2
            each = zip(q.unbind(at), k.unbind(at), v.unbind(at), strict=True)
            return torch.stack([answer(*window) for window in each], at)
        if q.dim() == 3:
            parts = [x.unflatten(0, (-1, len(references))) for x in (q, k, v)]
            return answer(*parts, attn_mask=attn_mask.unflatten(0, (-1, len(references)))).flatten(0, 1)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return SF.set_attention(q, k, v, references, num_iters=2, attn_mask=attn_mask)

    return answer


@pytest.mark.parametrize("name", CASES)
def test_the_one_call_of_softmax_is_set_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, given = built(name)
    plain = copy.deepcopy(module)
    plain.fused_attn = True  # Swin's asks for it
    replaced(module)
    assert isinstance(module, type(plain))
    found = module(*given)
    found.square().sum().backward()
    references = module.set_transport.references
    assert references.grad is not None
    assert references.grad.abs().sum() > 0
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", by_loops(references.detach(), name.startswith("windows beside"))
    )
    torch.testing.assert_close(found.detach(), plain(*given).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_pickles_are_the_module(name: str) -> None:
    module, given = built(name)
    expected = replaced(module)(*given)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(again) is type(module)
        assert torch.equal(again(*given), expected)


def test_products_of_its_own_are_not_used() -> None:
    """Where timm was told not to fuse, the class forms the weights itself."""
    module, given = built("eva")
    module.fused_attn = False
    softmax = module(*given)
    replaced(module)
    assert (module(*given) - softmax).abs().max() > 1e-3


def test_dropout_is_the_modules_own() -> None:
    module = replaced(eva.EvaAttention(WIDTH, 2, attn_drop=0.5, scale_norm=False, num_prefix_tokens=0)).train()
    x = tokens()
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: diff_attention.DiffAttention(WIDTH, 2), "more than once"),
        (lambda: xcit.XCA(WIDTH, 2), "width of its heads is unknown"),
    ],
)
def test_what_cannot_be_replaced_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    module = make()
    kind = type(module)
    report = replace_attention(nn.ModuleDict({"attention": module}), **OWN)
    assert not report.replaced
    assert reason in report.left["attention"]
    assert type(module) is kind
    assert not hasattr(module, "set_transport")


def test_a_compiled_module_is_the_module() -> None:
    module, given = built("eva")
    expected = replaced(module)(*given)
    torch._dynamo.reset()
    found = torch.compile(module, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(found, expected)


def test_an_exported_module_is_the_module() -> None:
    module, given = built("swin")
    expected = replaced(module)(*given)
    program = torch.export.export(module, given)
    torch.testing.assert_close(program.module()(*given), expected)


def test_a_whole_model_with_its_references_placed() -> None:
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2).eval()
    x = torch.randn(2, 3, 56, 56)
    names = [*model.state_dict()]
    report = replace_attention(model, **OWN)
    assert len(report.replaced) == 2
    assert not report.left
    assert set(names) < set(model.state_dict())
    before = model(x)
    initialize_references(model, x)
    assert (model(x) - before).abs().max() > 0


class Block(nn.Module):
    def __init__(self, layer: nn.Module, given: tuple[Any, ...]) -> None:
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, *self.given)


@pytest.mark.parametrize("name", CASES)
def test_each_is_one_node_of_a_graph(name: str) -> None:
    """As timm's feature extractors by graph want it."""
    module, (x, *rest) = built(name)
    block = Block(replaced(module), tuple(rest)).eval()
    traced = torch.fx.symbolic_trace(block)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"]
    torch.testing.assert_close(traced(x), block(x))
