"""Adapters around the attention of the package's models: a wrapper shows nothing of the module within but its call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setformer_kernels.models import (
    SequenceHead,
    SeTformer,
    TextEncoder,
    TextModel,
    initialize_references,
    replace_attention,
)
from setformer_kernels.nn import SeTAttention

SIZES = ((8, 8, 8, 8), (1, 1, 1, 1), (2, 2, 2, 2))
IMAGE = (2, 3, 64, 64)
# peft asks transformers in a way that newer ones warn of
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Wrapper(nn.Module):
    """As peft's lora.MultiheadAttention: base_layer, and none of its attributes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)


def vision(**arguments: Any) -> tuple[nn.Module, Tensor]:
    return SeTformer(*SIZES, num_references=4, num_classes=3, **arguments), torch.randn(IMAGE)


def text() -> tuple[nn.Module, Tensor]:
    encoder = TextEncoder(50, 16, 2, 2, 32, num_references=4, dropout=0.0)
    return TextModel(encoder, SequenceHead(16, 2, 0.0)), torch.randint(1, 50, (2, 7))


def timm_model() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    import setformer_kernels.models.timm  # noqa: F401

    return timm.create_model("setformer_nano", num_classes=3, depths=(1, 1, 1, 1)), torch.randn(IMAGE)


def transformers_vision() -> tuple[nn.Module, Tensor]:
    pytest.importorskip("transformers")
    from setformer_kernels.models.transformers import SeTformerConfig, SeTformerForImageClassification

    widths, depths, heads = (list(sizes) for sizes in SIZES)
    config = SeTformerConfig(widths=widths, depths=depths, num_heads=heads, num_references=4, num_labels=3)
    return SeTformerForImageClassification(config), torch.randn(IMAGE)


def transformers_text() -> tuple[nn.Module, Tensor]:
    pytest.importorskip("transformers")
    from setformer_kernels.models.transformers import SeTformerForSequenceClassification, SeTformerTextConfig

    config = SeTformerTextConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_references=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return SeTformerForSequenceClassification(config), torch.randint(1, 50, (2, 7))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vision": vision,
    "vision, no positions": lambda: vision(position_scale=None),
    "text": text,
    "timm": timm_model,
    "transformers, vision": transformers_vision,
    "transformers, text": transformers_text,
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


@pytest.mark.parametrize("name", MODELS)
def test_a_wrapper_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    want = output(model, x)
    for module in list(model.modules()):
        for child, inner in list(module.named_children()):
            if isinstance(inner, SeTAttention):
                setattr(module, child, Wrapper(inner))
    torch.testing.assert_close(output(model, x), want)
    output(model, x).sum().backward()
    grown = torch.randn(4, 3, 128, 128) if x.is_floating_point() else x
    initialize_references(model, grown)
    assert not torch.allclose(output(model, x), want)


@pytest.mark.parametrize("name", MODELS)
def test_lora_learns_merges_and_leaves_no_trace(name: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, x = MODELS[name]()
    start = copy.deepcopy(model).eval()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attention", "mlp.0"]))
    frozen = {key: p.clone() for key, p in adapted.named_parameters() if not p.requires_grad}
    torch.testing.assert_close(output(adapted.eval(), x), output(start, x), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (output(adapted, x) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(adapted.named_parameters())
    for key, value in frozen.items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-6, msg=key)
    want = output(adapted, x)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(output(merged, x), want, rtol=1e-3, atol=1e-4)
    assert merged.state_dict().keys() == start.state_dict().keys()


def test_lora_on_replaced_attention() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), torch.randn(2, 5, 16)
    replace_attention(model, num_references=4)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["self_attn"], init_lora_weights=False))
    output(adapted, x).square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert isinstance(adapted.merge_and_unload().self_attn, SeTAttention)


def test_attention_within_lora_is_refused_for_its_output_projection() -> None:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2)})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn"]))
    report = replace_attention(adapted)
    assert not report.replaced
    assert "peft.tuners.lora" in report.left["base_model.model.attn.base_layer"]
