"""nn.TransformerEncoderLayer in eval calls SeTAttention, whatever was done to hooks, copies, files and parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from nn_helpers import E, H, M, like
from torch import nn
from torch.func import functional_call

from setformer_kernels.nn import SeTAttention
from setformer_kernels.nn import attention as attention_file


def clear(module: nn.Module) -> None:
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()


def assign(module: nn.Module) -> None:
    module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()


def delete(module: nn.Module) -> None:
    for key in list(module._forward_pre_hooks):
        del module._forward_pre_hooks[key]


def pop(module: nn.Module) -> None:
    while module._forward_pre_hooks:
        module._forward_pre_hooks.popitem()


def bypass(module: nn.Module) -> None:
    vars(module)["_forward_pre_hooks"] = {}


CLEARINGS = [clear, assign, delete, pop, bypass]


def layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    host = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    host.self_attn = like(host.self_attn)
    return host


def without_hooks(host: nn.Module, clearing=clear) -> nn.Module:
    for module in host.modules():
        clearing(module)
    return host


def assert_eval_is_train(host: nn.Module, **call) -> None:
    x = torch.randn(2, 5, E)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        want = host.train()(x, **call)
        torch.testing.assert_close(host.eval()(x, **call), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clearing", CLEARINGS)
@pytest.mark.parametrize("switch", ["before", "after"])
def test_cleared_hooks_leave_softmax_off(clearing, switch):
    """Whether they are cleared before the switch to eval or after it."""
    host = layer().train(switch == "before")
    assert_eval_is_train(without_hooks(host, clearing))


def saved(host: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(host, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host)), saved])
def test_cleared_copies(duplicate):
    assert_eval_is_train(duplicate(without_hooks(layer())))
    assert_eval_is_train(without_hooks(duplicate(layer())))


def test_cleared_layers_whose_parameters_are_exchanged():
    host, other = without_hooks(layer()), layer().state_dict()
    x = torch.randn(2, 5, E)
    with torch.no_grad():
        want = host.train()(x)
        torch.testing.assert_close(functional_call(host.eval(), other, (x,)), want, rtol=1e-5, atol=1e-5)
    host.load_state_dict(other, assign=True)
    assert_eval_is_train(without_hooks(host.to(torch.float32)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [True, False])
def test_cleared_encoder_that_was_built_before_the_swap(padded):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True), 2)
    for host in encoder.layers:
        host.self_attn = like(host.self_attn)
    pad = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    x = torch.randn(2, 5, E)
    with torch.no_grad():
        call = {"src_key_padding_mask": pad} if padded else {}
        want = encoder.train()(x, **call)
        got = without_hooks(encoder).eval()(x, **call)
    real = ~pad if padded else ...
    torch.testing.assert_close(got[real], want[real], rtol=1e-5, atol=1e-5)


def test_modules_pickled_when_the_hook_was_a_function_of_ours():
    host = layer()
    host.self_attn._forward_pre_hooks.clear()
    host.self_attn.register_forward_pre_hook(attention_file.keep_python_forward)
    old = pickle.loads(pickle.dumps(host))
    assert_eval_is_train(without_hooks(old))
    assert list(map(len, (m._forward_pre_hooks for m in old.modules())))[1] == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_cleared_layer_compiled_and_exported(backend):
    torch.compiler.reset()
    host, x = layer().eval(), torch.randn(2, 5, E)
    with torch.no_grad():
        want = host(x)
        compiled = torch.compile(without_hooks(host), fullgraph=True, backend=backend)(x)
        exported = torch.export.export(without_hooks(host), (x,), strict=backend == "eager").module()(x)
    torch.testing.assert_close(compiled, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported, want, rtol=1e-5, atol=1e-5)


def test_registered_hooks_run_and_are_removed():
    module, calls = SeTAttention(E, H, num_references=M), []
    x = torch.randn(5, 2, E)
    for arguments in ({}, {"prepend": True}):
        handle = module.register_forward_pre_hook(lambda *_: calls.append(1), **arguments)
        module(x, key=x, value=x)
        handle.remove()
        module(x, x, x)
    assert len(calls) == 2


def test_no_function_of_this_package_runs_before_forward():
    """The strict export of torch 2.6 would take it for a second graph; torch._dynamo.export is that code."""
    torch.compiler.reset()
    module, x = SeTAttention(E, H, num_references=M).eval(), torch.randn(5, 2, E)
    graph, _ = torch._dynamo.export(module)(x, x, x)
    torch.testing.assert_close(graph(x, x, x)[0], module(x, x, x)[0], rtol=1e-5, atol=1e-5)
