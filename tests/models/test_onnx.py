"""ONNX by both exporters: a module as it is built, any batch and length, equal to PyTorch in onnxruntime."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import setformer_kernels.functional as SF
from setformer_kernels import SeTAttention, SeTPooling
from setformer_kernels.models import SeTformer, replace_attention

Tensors = tuple[Tensor, ...]


class Call(nn.Module):
    """A module, or none, called by a function; in eval."""

    def __init__(self, function: Callable[..., Any], module: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.module = function, module
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs) if self.module is None else self.function(self.module, *inputs)


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensors]  # of a batch size and a length
    free: tuple[dict[int, str], ...]  # the free dimensions of each input


def attention(function: Callable[..., Any], **options: Any) -> Callable[[], nn.Module]:
    options = {"batch_first": True, "num_references": 8} | options
    return lambda: Call(function, SeTAttention(16, 2, **options))


def tokens(b: int, n: int) -> Tensor:
    return torch.randn(b, n, 16)


def padding(b: int, n: int) -> Tensor:
    mask = torch.zeros(b, n, dtype=torch.bool)
    mask[0, n // 2 :] = n > 1
    return mask


FREE = {0: "batch", 1: "length"}
CASES = {
    "plain": Case(attention(lambda m, x: m(x, x, x, need_weights=False)[0]), lambda b, n: (tokens(b, n),), (FREE,)),
    "padding_and_weights": Case(
        attention(lambda m, x, p: m(x, x, x, key_padding_mask=p), num_iters=1),
        lambda b, n: (tokens(b, n), padding(b, n)),
        (FREE, FREE),
    ),
    "causal_scan": Case(
        attention(lambda m, x: m(x, x, x, need_weights=False, is_causal=True)[0], num_iters=1),
        lambda b, n: (tokens(b, n),),
        (FREE,),
    ),
    "mask_and_learned_epsilon": Case(  # no bound of the logits is known
        attention(lambda m, x, a: m(x, x, x, need_weights=False, attn_mask=a)[0], num_iters=1, learn_epsilon=True),
        lambda b, n: (tokens(b, n), torch.randn(n, n)),
        (FREE, {0: "length", 1: "length"}),
    ),
    "everything_else": Case(
        attention(
            lambda m, x, p: m(x, x, x, need_weights=False, query_position=p, key_position=p)[0], batch_first=False,
            value_map="rkhs", position_dim=2, add_bias_kv=True, add_zero_attn=True, learn_log_mass=True, num_iters=1,
        ),
        lambda b, n: (tokens(n, b), torch.rand(n, 2)),
        ({0: "length", 1: "batch"}, {0: "length"}),
    ),
    "pooling": Case(
        lambda: Call(lambda m, x, p: m(x, p), SeTPooling(16, 2, num_references=4, num_iters=1)),
        lambda b, n: (tokens(b, n), padding(b, n)),
        (FREE, FREE),
    ),
    "functional": Case(
        lambda: Call(lambda l, x, w: (*SF.sinkhorn(l, num_iters=2, tol=0.1), SF.nystrom_features(x, w))),
        lambda b, n: (torch.randn(b, n, 8), torch.randn(b, 2, n, 8), torch.randn(2, 4, 8)),
        (FREE, {0: "batch", 2: "length"}, {}),
    ),
}  # fmt: skip


def exported(exporter: str, model: Any, inputs: Tensors, free: tuple[dict[int, str], ...]) -> bytes:
    names = [f"x{i}" for i in range(len(inputs))]
    shapes = {"dynamic_shapes": {"inputs": free}}
    if isinstance(model, torch.export.ExportedProgram):
        inputs, shapes = (), {}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters about themselves
            if exporter == "torchscript":
                file = io.BytesIO()
                axes = dict(zip(names, free, strict=True))
                torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes)
                return file.getvalue()
            program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, **shapes)
    finally:
        logging.disable(before)
    assert program is not None
    return program.model_proto.SerializeToString()


def check(model: nn.Module, onnx: bytes, inputs: Tensors) -> None:
    session = onnxruntime.InferenceSession(onnx)
    found = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)})
    with torch.no_grad():
        wanted = model(*inputs)
    for result, expected in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", CASES)
def test_a_module_as_it_is_built(name: str, exporter: str) -> None:
    build, inputs, free = CASES[name]
    model = build()
    onnx = exported(exporter, model, inputs(2, 40), free)
    for batch, length in ((2, 40), (3, 9), (4, 70), (1, 1)):
        check(model, onnx, inputs(batch, length))


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_saved_program(decomposed: bool) -> None:
    """torch.export keeps the native op, whatever it decomposes; torch.onnx takes it apart."""
    build, inputs, free = CASES["pooling"]
    model = build()
    hints = tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for dims in free)
    program = torch.export.export(model, inputs(2, 5), dynamic_shapes={"inputs": hints})
    if decomposed:
        program = program.run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    assert torch.ops.setformer_kernels.set_pool.default in {node.target for node in program.graph.nodes}
    check(model, exported("dynamo", program, (), ()), inputs(3, 9))


@pytest.mark.parametrize(
    ("backend", "exporter"), [("cpu", "dynamo"), ("cpu", "torchscript"), ("reference", "torchscript")]
)
def test_a_backend_asked_for_by_name(backend: str, exporter: str) -> None:
    call = attention(lambda m, x: m(x, x, x, need_weights=False, is_causal=True)[0], num_iters=1, backend=backend)
    model, free = call(), (FREE,)
    onnx = exported(exporter, model, (tokens(2, 5),), free)
    check(model, onnx, (tokens(3, 40),))


def test_a_vision_model_by_torchscript() -> None:
    model = SeTformer((16, 16, 16, 16), (1, 1, 1, 1), (2, 2, 2, 2), num_references=4, num_classes=3, pool="set").eval()
    onnx = exported("torchscript", model, (torch.randn(2, 3, 32, 32),), ({0: "batch"},))
    check(model, onnx, (torch.randn(3, 3, 32, 32),))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_timms_attention_after_its_replacement(exporter: str) -> None:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    model = Call(lambda m, x: m(x), nn.Sequential(vision_transformer.Attention(16, num_heads=2)))
    replace_attention(model, num_references=4)
    onnx = exported(exporter, model, (tokens(2, 5),), (FREE,))
    for batch, length in ((3, 40), (1, 1)):
        check(model, onnx, (tokens(batch, length),))


def test_jit_trace_keeps_the_native_op() -> None:
    model = CASES["plain"].build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (tokens(2, 5),))
    assert "setformer_kernels::set_attention" in str(traced.inlined_graph)
