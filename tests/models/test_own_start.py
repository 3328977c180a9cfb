"""Meta device, to_empty, every module's reset_parameters: each tensor is what its constructor would have made it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setformer_kernels.models import (
    CausalDecoder,
    MaskedLMHead,
    SequenceHead,
    SeTformer,
    TextEncoder,
    TextModel,
    TokenHead,
)
from setformer_kernels.models.transport import SetTransport
from setformer_kernels.nn import SeTAttention, SeTPooling

SIZES = ((16, 16, 32, 32), (1, 1, 2, 1), (2, 2, 2, 4))
EVERYTHING = {"learn_epsilon": True, "learn_log_mass": True, "value_map": "rkhs"}


def text() -> TextEncoder:
    return TextEncoder(50, 32, 1, 2, 64, num_references=4, max_positions=40, position_scale=3.0, attention=EVERYTHING)


def tied() -> TextModel:
    encoder = text()
    return TextModel(encoder, MaskedLMHead(32, 50).tie(encoder))


def timm_model() -> nn.Module:
    timm = pytest.importorskip("timm")
    import setformer_kernels.models.timm  # noqa: F401

    return timm.create_model("setformer_nano", num_classes=5, global_pool="set", depths=(1, 1, 1, 1))


def of_transformers(kind: str, **config: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        pytest.importorskip("transformers")
        from setformer_kernels.models import transformers as ours

        if kind == "CausalLM":
            settings: object = ours.SeTformerCausalConfig(
                vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                initializer_range=0.1, num_references=4, **config,
            )  # fmt: skip
        elif kind.startswith("Text") or kind in ("MaskedLM", "SequenceClassification", "TokenClassification"):
            settings = ours.SeTformerTextConfig(
                vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                initializer_range=0.1, num_references=4, **config,
            )  # fmt: skip
        else:
            widths, depths, heads = SIZES
            settings = ours.SeTformerConfig(
                widths=list(widths), depths=list(depths), num_heads=list(heads), initializer_range=0.1,
                num_references=4, **config,
            )  # fmt: skip
        return getattr(
            ours, f"SeTformer{kind}" if kind in ("Model", "Backbone", "TextModel") else f"SeTformerFor{kind}"
        )(settings)

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: SeTAttention(32, 2, add_bias_kv=True, position_dim=2, position_scale=2.5, **EVERYTHING),
    "cross attention": lambda: SeTAttention(32, 2, kdim=16, vdim=24, epsilon=0.3, learn_epsilon=True),
    "pooling": lambda: SeTPooling(32, 2, position_dim=1, position_scale=0.5, **EVERYTHING),
    "transport": lambda: SetTransport(2, 16, torch.empty(0), {**EVERYTHING}),
    "vision": lambda: SeTformer(*SIZES, num_references=4, num_classes=5, pool="set", layer_scale=0.3),
    "vision, no positions": lambda: SeTformer(*SIZES, position_scale=None, features_only=True, attention=EVERYTHING),
    "text": text,
    "text, head": lambda: TextModel(text(), SequenceHead(32, 3)),
    "text, tokens": lambda: TextModel(text(), TokenHead(32, 3)),
    "text, words": tied,
    "causal": lambda: CausalDecoder(50, 32, 1, 2, 64, num_references=4, pad_token_id=3, attention=EVERYTHING),
    "timm": timm_model,
    "image classifier": of_transformers("ImageClassification", pool="set", layer_scale=0.2),
    "backbone": of_transformers("Backbone"),
    "masked words": of_transformers("MaskedLM", position_scale=2.0),
    "sequences": of_transformers("SequenceClassification"),
    "language model": of_transformers("CausalLM", pad_token_id=3),
}


def fill(model: nn.Module) -> None:
    """Makes memory that nobody initialises visible."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else -7)


def reset(model: nn.Module, children_first: bool) -> None:
    modules = list(model.modules())
    for module in reversed(modules) if children_first else modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def check_alike(name: str, got: Tensor, want: Tensor) -> None:
    """The same constant, or a draw of the same mean and deviation."""
    assert got.dtype == want.dtype, name
    if want.min() == want.max():
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0, msg=name)
        return
    assert got.std() / want.std() == pytest.approx(1.0, abs=4.0 / math.sqrt(want.numel()) + 0.02), name
    torch.testing.assert_close(got.eq(0).all(-1), want.eq(0).all(-1), msg=name)  # the row of the padding


@pytest.mark.parametrize("children_first", [False, True], ids=["parents first", "children first"])
@pytest.mark.parametrize("name", MODELS)
def test_reset_parameters_gives_what_the_constructor_gives(name: str, children_first: bool) -> None:
    torch.manual_seed(0)
    built = MODELS[name]()
    with torch.device("meta"):
        model = MODELS[name]()
    model.to_empty(device="cpu")
    fill(model)
    reset(model, children_first)
    tensors = {**dict(built.named_parameters(remove_duplicate=False)), **dict(built.named_buffers())}
    got = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert got.keys() == tensors.keys()
    for key, want in tensors.items():
        check_alike(key, got[key].detach(), want.detach())


@pytest.mark.parametrize("name", MODELS)
def test_reset_parameters_of_a_model_in_use(name: str) -> None:
    torch.manual_seed(0)
    built, model = MODELS[name](), MODELS[name]()
    fill(model)
    reset(model, children_first=False)
    for key, want in built.named_parameters():
        check_alike(key, model.get_parameter(key).detach(), want.detach())
