"""torch.jit.script and torch.ao.quantization: an answer that names the class, and modules that stay in float."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization as ao
from nn_helpers import E, H, M
from torch import Tensor, nn
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from setformer_kernels.models import SeTformer, TextEncoder
from setformer_kernels.models.text import TextModel, TokenHead
from setformer_kernels.models.transport import SetTransport
from setformer_kernels.nn import SeTAttention, SeTPooling


class SelfAttention(nn.Module):
    """x [B, S, E] by an attention layer or by a transport between heads."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, SeTAttention):
            return self.layer(x, x, x, need_weights=False)[0]
        heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
        return self.layer(heads, heads, heads).transpose(1, 2).flatten(-2)


class Tokens(nn.Module):
    """x [B, S, E] by a text encoder."""

    def __init__(self) -> None:
        super().__init__()
        encoder = TextEncoder(20, E, 1, H, 8, num_references=M, dropout=0.0)
        self.model = TextModel(encoder, TokenHead(E, E))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x)


class Image(nn.Module):
    """x [B, S, E] as an image of one channel by a vision backbone, broadcast to [B, S, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SeTformer((8,) * 4, (1,) * 4, (2,) * 4, num_references=M, in_channels=1, num_classes=E)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(nn.functional.interpolate(x.unsqueeze(1), (32, 32))).unsqueeze(1) + x


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: SelfAttention(SeTAttention(E, H, batch_first=True, num_references=M)),
    "widths": lambda: SelfAttention(SeTAttention(E, H, batch_first=True, num_references=M, kdim=E, value_map="rkhs")),
    "pooling": lambda: SeTPooling(E, H, num_references=M),
    "transport": lambda: SelfAttention(SetTransport(H, E // H, torch.zeros(()), {"num_references": M})),
    "text": Tokens,
    "vision": Image,
}


class Net(nn.Module):
    """A quantized linear layer, the layer in float, and another quantized linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.quant, self.first, self.dequant, self.layer = ao.QuantStub(), nn.Linear(E, E), ao.DeQuantStub(), layer
        self.quant2, self.last, self.dequant2 = ao.QuantStub(), nn.Linear(E, E), ao.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.dequant(self.first(self.quant(x))))
        return self.dequant2(self.last(self.quant2(y)))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        # torch.ao and torch.jit announce their successors
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def net(request) -> Net:
    torch.manual_seed(0)
    return Net(LAYERS[request.param]()).eval()


def quantized(model: nn.Module) -> list[str]:
    """The names of the linear layers that were exchanged."""
    kinds = (torch.ao.nn.quantized.Linear, torch.ao.nn.quantized.dynamic.Linear)
    return [name for name, child in model.named_modules() if isinstance(child, kinds)]


@pytest.mark.parametrize("net", LAYERS, indirect=True)
@pytest.mark.parametrize("training", [False, True])
def test_static_quantization_leaves_the_layer_in_float(net, training):
    x = torch.randn(4, 5, E)
    want, before = net(x), copy.deepcopy(net.layer.state_dict())
    net.train(training).qconfig = ao.get_default_qat_qconfig("x86") if training else ao.get_default_qconfig("x86")
    prepared = (ao.prepare_qat if training else ao.prepare)(net)
    prepared(x).square().sum().backward()
    converted = ao.convert(prepared.eval())
    assert quantized(converted) == ["first", "last"]
    assert converted.layer.state_dict().keys() == before.keys()
    assert (converted(x) - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize("net", LAYERS, indirect=True)
def test_a_layer_prepared_alone_stays_as_it_is(net):
    layer, x = net.layer, torch.randn(4, 5, E)
    want = layer(x)
    layer.qconfig = ao.get_default_qconfig("x86")
    prepared = ao.prepare(layer)
    prepared(x)
    assert torch.equal(ao.convert(prepared)(x), want)
    assert torch.equal(ao.convert(layer)(x), want)


def test_dynamic_quantization_still_takes_linear_layers():
    pool, x = SeTPooling(E, H, num_references=M), torch.randn(4, 5, E)
    converted = ao.quantize_dynamic(pool, {nn.Linear})
    assert quantized(converted) == ["kv_proj", "out_proj"]
    assert (converted(x) - pool(x)).abs().max() < 0.1


def test_quantization_of_graphs():
    net, x = Net(LAYERS["attention"]()).eval(), torch.randn(4, 5, E)
    want = net(x)
    custom = PrepareCustomConfig().set_non_traceable_module_classes([SelfAttention, SeTAttention])
    prepared = prepare_fx(net, ao.get_default_qconfig_mapping("x86"), (x,), prepare_custom_config=custom)
    prepared(x)
    assert (convert_fx(prepared)(x) - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize("net", LAYERS, indirect=True)
def test_scripting_says_what_to_use_instead(net):
    for model in (net, net.layer):
        with pytest.raises(NotImplementedError, match=r"does not read SeTAttention .* torch.jit.trace, torch.export"):
            torch.jit.script(model)
    x = torch.randn(4, 5, E)
    traced = torch.jit.trace(net, x)
    torch.testing.assert_close(torch.jit.script(traced)(x), net(x), rtol=1e-4, atol=1e-5)


class Asking(nn.Module):
    def __init__(self, module: nn.Module, need_weights: bool) -> None:
        super().__init__()
        self.module, self.need_weights = module, need_weights

    def forward(self, query: Tensor, key: Tensor, pad: Tensor) -> tuple[Tensor, ...]:
        return self.module(query, key, key, pad, self.need_weights)[: 1 + self.need_weights]


@pytest.mark.parametrize("need_weights", [True, False])
def test_traces_with_gradients(need_weights):
    """torch.jit.trace runs the module again, without gradients, and refuses another graph."""
    module = SeTAttention(E, H, num_references=M, batch_first=True).eval()
    query, key, pad = torch.randn(2, 4, E), torch.randn(2, 5, E), torch.arange(5).expand(2, 5) >= 3
    traced = torch.jit.trace(Asking(module, need_weights), (query, key, pad))
    torch.testing.assert_close(traced(query, key, pad), module(query, key, key, pad, need_weights)[: 1 + need_weights])


def test_quantized_inputs_are_refused_by_name():
    x = torch.quantize_per_tensor(torch.randn(4, 5, E), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match="`query` must be a floating-point tensor"):
        SeTAttention(E, H)(x, x, x)
    with pytest.raises(TypeError, match="`x` must be a floating-point tensor"):
        SeTPooling(E, H)(x)
