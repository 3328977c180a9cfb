"""replace_attention on modules that need nothing but torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setformer_kernels.models import initialize_references, replace_attention
from setformer_kernels.nn import SeTAttention

C, H = 16, 4


class Odd(nn.MultiheadAttention):
    """A subclass, whose forward could be another."""


class MyOwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(C, C)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(C, H, 32, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cross = nn.MultiheadAttention(C, H, 0.1, False, True, True, kdim=8, vdim=12)
        self.again = self.cross
        self.odd, self.own = Odd(C, H), MyOwnAttention()
        self.ours = SeTAttention(C, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


def test_replaces_what_it_knows_and_names_the_rest() -> None:
    model = Host()
    before = dict(model.named_parameters())
    report = replace_attention(model, num_references=5, num_iters=1)
    names = ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "cross", "again")
    assert report.replaced == dict.fromkeys(names, "MultiheadAttention")
    assert set(report.left) == {"odd", "own"}
    assert "Odd is a subclass of nn.MultiheadAttention" in report.left["odd"]
    assert report.left["own"] == "no rule for MyOwnAttention"
    assert "replaced cross: MultiheadAttention" in str(report)
    assert "left own: no rule for MyOwnAttention" in str(report)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = {name.rpartition(".")[2] for name in after.keys() - before.keys()}
    assert added == {"references"}
    assert model.again is model.cross
    assert (model.cross.kdim, model.cross.vdim, model.cross.dropout, model.cross.add_zero_attn) == (8, 12, 0.1, True)
    assert model.cross.num_references == 5
    assert not replace_attention(model).replaced


def test_replaced_model_runs_alike_in_both_modes_and_learns() -> None:
    model = Host().encoder
    replace_attention(model, num_references=5)
    x = torch.randn(3, 7, C)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [1]])
    y = model(x, src_key_padding_mask=padding)
    with torch.inference_mode():
        again = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(again[~padding], y[~padding])
    y.square().mean().backward()
    assert model.layers[0].self_attn.references.grad.any()


def test_references_can_be_placed_afterwards() -> None:
    model = Host()
    replace_attention(model, num_references=5)
    before = model.encoder.layers[1].self_attn.references.detach().clone()
    initialize_references(model, torch.randn(4, 9, C))
    assert not torch.equal(model.encoder.layers[1].self_attn.references, before)


def test_skip_mode_and_dtype() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(C, H), "b": nn.MultiheadAttention(C, H)}).double().eval()
    report = replace_attention(model, skip=lambda name, module: name == "b")
    assert report.left == {"b": "skipped by the caller"}
    assert isinstance(model["a"], SeTAttention)
    assert type(model["b"]) is nn.MultiheadAttention
    assert model["a"].references.dtype == torch.float64
    assert not model["a"].training


def test_parametrized_weights_are_left() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(C, H)})
    nn.utils.parametrizations.weight_norm(model["a"], "in_proj_weight")
    report = replace_attention(model)
    assert not report.replaced
    assert list(report.left) == ["a"]


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        replace_attention("bert")
    with pytest.raises(ValueError, match="model must contain attention modules, got an attention module"):
        replace_attention(nn.MultiheadAttention(C, H))
    with pytest.raises(ValueError, match="position_dim must be 0"):
        replace_attention(Host(), position_dim=2)
    with pytest.raises(TypeError, match="num_reference"):
        replace_attention(Host(), num_reference=2)
