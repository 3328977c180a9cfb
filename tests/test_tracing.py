"""torch.fx: the package's modules and functions are leaves of symbolic tracing."""

from __future__ import annotations

import pickle

import pytest
import torch
from nn_helpers import E, H, M
from torch import nn
from torch.fx import Tracer, symbolic_trace

import setformer_kernels.functional as SF
from setformer_kernels.models import SequenceHead, SeTformer, TextEncoder, TextModel
from setformer_kernels.models.transport import SetTransport
from setformer_kernels.nn import SeTAttention, SeTPooling

ATTENTION = {"batch_first": True, "num_references": M}


class Around(nn.Module):
    """A model that calls inner on x thrice, as self-attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.linear = inner, nn.Linear(E, E)

    def forward(self, x):  # torch.fx cannot pickle annotations that are strings
        x = self.linear(x)
        y, _ = self.inner(x, x, value=x, need_weights=False)
        return self.linear(y)


class Calls(nn.Module):
    """A model that calls inner on its arguments."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.inner(*(x[i] for i in range(3))) if isinstance(self.inner, SetTransport) else self.inner(x[0])


def modules_called(graph_module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]


def test_attention_is_a_leaf_for_every_length():
    model = Around(SeTAttention(E, H, **ATTENTION))
    traced = symbolic_trace(model)
    assert modules_called(traced) == ["linear", "inner", "linear"]
    assert traced.inner is model.inner
    for shape in ((2, 5, E), (3, 9, E)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), model(x))
    copy = pickle.loads(pickle.dumps(traced))
    torch.testing.assert_close(copy(x), model(x))


def test_hooks_of_a_leaf_run_once_a_call_and_not_while_tracing():
    model, calls = Around(SeTAttention(E, H, **ATTENTION)), []
    model.inner.register_forward_pre_hook(lambda module, args: calls.append(type(args[0])))
    model.inner.register_forward_hook(lambda module, args, output: (3 * output[0], output[1]))
    traced, x = symbolic_trace(model), torch.randn(2, 5, E)
    assert calls == []
    torch.testing.assert_close(traced(x), model(x))
    assert calls == [torch.Tensor] * 2


def test_pooling_and_transport_are_leaves():
    x, heads = torch.randn(2, 7, E), [torch.randn(2, H, 7, E // H) for _ in range(3)]
    transport = SetTransport(H, E // H, heads[0], {"num_references": M})
    for module, args in ((SeTPooling(E, H, num_references=M), [x]), (transport, heads)):
        model = Calls(module)
        traced = symbolic_trace(model)
        assert modules_called(traced) == ["inner"]
        torch.testing.assert_close(traced(*args), model(*args))


def test_a_tracer_that_takes_them_for_leaves_itself_is_obeyed():
    class AllLeaves(Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return True

    graph = AllLeaves().trace(Around(SeTAttention(E, H, **ATTENTION)))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["linear", "inner", "linear"]


def every_function(q, k, v, references, landmarks):
    f, g = SF.sinkhorn(q @ k.mT, num_iters=3)
    features = SF.nystrom_features(v, landmarks)
    out = SF.set_attention(q, k, features, references=references, num_iters=2) + f[..., None]
    weights = SF.set_attention_weights(q, k, references)
    read = SF.set_read(q, SF.set_transport(k, v, references), references)
    return out, weights, SF.set_pool(k, v, references), g, read


def test_functions_are_leaves():
    args = [torch.randn(1, 2, 5, 4) for _ in range(3)] + [torch.randn(2, 3, 4), torch.randn(2, 4, 4)]
    traced = symbolic_trace(every_function)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    own = {SF.set_attention, SF.set_attention_weights, SF.set_pool, SF.nystrom_features, SF.sinkhorn}
    assert own | {SF.set_transport, SF.set_read} <= called
    for got, want in zip(pickle.loads(pickle.dumps(traced))(*args), every_function(*args), strict=True):
        torch.testing.assert_close(got, want)
    with pytest.raises(TypeError, match="query must be a Tensor"):
        SF.set_attention("query", *args[1:4])


@pytest.mark.parametrize("pool", ["mean", "set"])
def test_vision_model_traces_in_both_modes(pool):
    model = SeTformer((8, 8, 8, 8), (1, 1, 1, 1), (2, 2, 2, 2), num_references=3, num_classes=3, pool=pool,
                      pool_references=2, drop_path_rate=0.5).eval()  # fmt: skip
    traced = symbolic_trace(model)
    for shape in ((1, 3, 64, 64), (2, 3, 40, 96)):
        image = torch.randn(shape)
        torch.testing.assert_close(traced(image), model(image))
    with pytest.raises(ValueError, match="height and width"):
        traced(torch.randn(1, 3, 16, 16))
    trained = symbolic_trace(model.train())
    assert trained(image).shape == (2, 3)
    torch.testing.assert_close(trained.eval()(image), model.eval()(image))  # the drop path is a leaf, with its mode


def test_text_model_traces():
    model = TextModel(TextEncoder(50, E, 2, H, 32, num_references=M), SequenceHead(E, 2)).eval()
    absent = dict.fromkeys(("token_type_ids", "position_ids", "inputs_embeds"))
    traced = symbolic_trace(model, concrete_args=absent)
    for B, L in ((2, 7), (3, 11)):
        ids, mask = torch.randint(0, 50, (B, L)), torch.arange(L) < torch.randint(1, L, (B, 1))
        torch.testing.assert_close(traced(ids, mask), model(ids, mask))
