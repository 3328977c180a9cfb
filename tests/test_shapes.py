"""Empty, size-1 and stride-0 tensors through every op, transform and backend give what the reference gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conftest import GPU_BACKENDS
from test_cuda_kernels import backend as cuda_backend
from test_cuda_kernels import shim
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import setformer_kernels.functional as SF

__all__ = ["cuda_backend", "shim"]  # fixtures

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]

ORDINARY = {"B": 2, "H": 2, "L": 3, "S": 4, "M": 3, "D": 4, "E": 3, "P": 2, "N": 4}
SHAPES: dict[str, dict[str, int]] = {
    "ordinary": {},
    "one_problem": {"B": 1, "H": 1},
    "ones": dict.fromkeys(ORDINARY, 1),
    "no_batch": {"B": 0},
    "one_head_no_batch": {"B": 0, "H": 1},
    "no_query": {"L": 0},
    "no_key": {"S": 0},
    "no_token": {"L": 0, "S": 0},
    "nothing": {"B": 0, "L": 0, "S": 0},
}
LENGTHLESS = ("no_query", "no_key", "no_token", "nothing")  # shapes that sinkhorn, which has no such sizes, leaves out
POSITIVE = ("bandwidth", "epsilon", "position_scale", "key_relaxation", "reference_relaxation")
CONSTANT = ("query_position", "key_position")  # without gradient

TOKENS = {"query": "BHLD", "key": "BHSD", "value": "BHSE", "references": "HMD"}
EVERYTHING = TOKENS | {
    "key_mask": "BS", "reference_log_mass": "HM", "query_position": "BLP", "key_position": "BSP",
    "reference_position": "HMP", **dict.fromkeys(POSITIVE, "H"),
}  # fmt: skip
POOLED = {name: shape for name, shape in EVERYTHING.items() if "query" not in name}


class Op(NamedTuple):
    """A function, its tensors with their shapes, its constants."""

    function: Callable[..., Any]
    tensors: dict[str, str]
    constants: dict[str, Any]

    def sizes(self, shape: str) -> dict[str, int]:
        sizes = ORDINARY | SHAPES[shape]
        return sizes | {"S": sizes["L"]} if self.constants.get("causal") else sizes

    def shapes(self) -> list[str]:
        return [s for s in SHAPES if self.function is not SF.sinkhorn or s not in LENGTHLESS]

    def differentiable(self) -> list[int]:
        return [i for i, name in enumerate(self.tensors) if name not in CONSTANT]

    def inputs(self, shape: str, dtype: torch.dtype) -> Tensors:
        torch.manual_seed(1)
        sizes = self.sizes(shape)
        drawn = {n: torch.randn([sizes[c] for c in letters], dtype=dtype) for n, letters in self.tensors.items()}
        return tuple(t.sigmoid() if name in POSITIVE else t for name, t in drawn.items())

    def call(self, backend: str) -> Function:
        def run(*tensors: Tensor) -> Tensors:
            seed = {"seed": torch.tensor(7)} if "dropout_p" in self.constants else {}
            keywords = dict(zip(self.tensors, tensors, strict=True)) | self.constants | seed
            result = self.function(**keywords, backend=backend)
            return (result,) if isinstance(result, Tensor) else result

        return run


SCAN = {"causal": True, "num_iters": 1}
OPS = {
    "attention": Op(SF.set_attention, TOKENS, {"num_iters": 2, "epsilon": 0.5}),
    "attention_of_everything": Op(SF.set_attention, EVERYTHING, {"num_iters": 2}),
    "attention_by_products": Op(SF.set_attention, TOKENS, {"num_iters": 0, "kernel": "dot", "epsilon": 1.0}),
    "dropout": Op(SF.set_attention, TOKENS, {"num_iters": 1, "epsilon": 0.5, "dropout_p": 0.4}),
    "causal": Op(SF.set_attention, TOKENS, SCAN | {"epsilon": 0.5}),
    "causal_of_everything": Op(SF.set_attention, EVERYTHING, SCAN),
    "masked": Op(SF.set_attention, TOKENS | {"attn_mask": "BHLS"}, {"num_iters": 2, "epsilon": 0.5}),
    "weights": Op(SF.set_attention_weights, {n: s for n, s in EVERYTHING.items() if n != "value"}, {"num_iters": 1}),
    "pool": Op(SF.set_pool, POOLED, {"num_iters": 2}),
    "features": Op(SF.nystrom_features, {"x": "BHSD", "landmarks": "HMD", "bandwidth": "H"}, {"ridge": 0.1}),
    "sinkhorn": Op(
        SF.sinkhorn,
        {"log_kernel": "BHNM", "log_a": "BHN", "log_b": "BHM", "key_relaxation": "BH", "reference_relaxation": "BH"},
        {"num_iters": 3},
    ),
    "sinkhorn_without_iterations": Op(
        SF.sinkhorn, {"log_kernel": "BNM", "log_a": "BN", "log_b": "BM", "key_relaxation": "B"}, {"num_iters": 0}
    ),
    "sinkhorn_of_one_batch": Op(
        SF.sinkhorn, {"log_kernel": "BNM", "log_a": "N"}, {"num_iters": 2, "tol": 1e-3, "key_relaxation": 0.9}
    ),
    "sinkhorn_of_a_matrix": Op(SF.sinkhorn, {"log_kernel": "NM"}, {"num_iters": 2}),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "first_expanded": lambda t: t[:1].expand(t.shape),
    "last_expanded": lambda t: t[..., :1].expand(t.shape),
    "all_expanded": lambda t: t.sum().expand(t.shape) / 4,
    "apart": lambda t: torch.stack((t, t), -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
}


def forward(f: Function, differentiable: list[int], *tensors: Tensor) -> Tensors:
    return f(*tensors)


def backward_of_a_sum(f: Function, differentiable: list[int], *tensors: Tensor) -> Tensors:
    """The cotangent of a sum has stride 0."""
    leaves, wanted = leaves_of(differentiable, tensors)
    return torch.autograd.grad(sum(o.sum() for o in f(*leaves)), wanted, materialize_grads=True)


def backward_of_one_output(f: Function, differentiable: list[int], *tensors: Tensor) -> Tensors:
    """The cotangent lies in another memory order; those of the other outputs are made up."""
    leaves, wanted = leaves_of(differentiable, tensors)
    o = f(*leaves)[0]
    cotangent = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape[::-1]).permute(*reversed(range(o.ndim)))
    return torch.autograd.grad(o, wanted, cotangent, materialize_grads=True)


def leaves_of(differentiable: list[int], tensors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """All tensors as leaves; those that want a gradient."""
    leaves = [t.detach().requires_grad_(i in differentiable) for i, t in enumerate(tensors)]
    return leaves, [leaves[i] for i in differentiable]


def gradient(f: Function, differentiable: list[int], *tensors: Tensor) -> Tensors:
    def loss(*t: Tensor) -> Tensor:
        return functools.reduce(torch.add, [o.square().sum() for o in f(*t)])

    return torch.func.grad(loss, argnums=tuple(differentiable))(*tensors)


def jacobian(f: Function, differentiable: list[int], *tensors: Tensor) -> Tensors:
    """vmap over the backward alone: what the forward saved is expanded."""
    return torch.func.jacrev(lambda *t: f(*t)[0], argnums=tuple({differentiable[0], differentiable[-1]}))(*tensors)


TRANSFORMS = (forward, backward_of_a_sum, backward_of_one_output, gradient, jacobian)
# By position; the first and the others, or only the last one batched.
BATCHED: dict[str, Callable[[int], list[int | None]]] = {
    "all_at_0": lambda n: [0] * n,
    "first_at_-1": lambda n: [-1, *[None] * (n - 1)],
    "first_at_1": lambda n: [1, *[0] * (n - 1)],
    "last": lambda n: [*[None] * (n - 1), 0],
}


def batched(t: Tensor, dim: int | None, size: int) -> Tensor:
    """`size` multiples of the tensor along a new dimension."""
    if dim is None:
        return t
    return torch.stack([t * (1 - i / 8) for i in range(size)], dim) if size else t.unsqueeze(dim).narrow(dim, 0, 0)


def vmapped(transform: Any, dims: list[int | None], f: Function, differentiable: list[int], *t: Tensor) -> Tensors:
    return torch.vmap(functools.partial(transform, f, differentiable), in_dims=tuple(dims))(*t)


def check(name: str, transform: Any, backend: str, shape: str, tensors: Tensors) -> None:
    """The backend's results are the reference's, and of the same shape and dtype."""
    op = OPS[name]
    found, wanted = (transform(op.call(b), op.differentiable(), *tensors) for b in (backend, "reference"))
    torch.testing.assert_close(found, wanted, msg=lambda text: f"{name}, {shape}: {text}")


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend in (*GPU_BACKENDS, "cuda") else torch.float64


def named(backend: str) -> str:
    return "auto" if backend == "eager" else backend


def on(*backends: str) -> Any:
    """Some of the backends; the others' kernels run in slow motion here."""
    return pytest.mark.parametrize("native", backends, indirect=True)


@on("cpu", "eager")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", OPS)
def test_every_transform_of_every_shape(name: str, transform: Any, native: str) -> None:
    for shape in OPS[name].shapes():
        check(name, transform, named(native), shape, OPS[name].inputs(shape, dtype_of(native)))


@on("cpu")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_every_layout(name: str, layout: str, native: str) -> None:
    for shape in ("ordinary", "ones", "no_batch"):
        tensors = tuple(map(LAYOUTS[layout], OPS[name].inputs(shape, dtype_of(native))))
        for transform in (forward, backward_of_a_sum, backward_of_one_output):
            check(name, transform, named(native), f"{layout} {shape}", tensors)


def check_vmap(name: str, backend: str, size: int, dims: str, shape: str, transforms: Sequence[Any]) -> None:
    tensors = OPS[name].inputs(shape, dtype_of(backend))
    in_dims = BATCHED[dims](len(tensors))
    tensors = tuple(batched(t, d, size) for t, d in zip(tensors, in_dims, strict=True))
    for transform in transforms:
        check(name, functools.partial(vmapped, transform, in_dims), named(backend), f"vmap of {size} {shape}", tensors)


@on("cpu")
@pytest.mark.parametrize("dims", BATCHED)
@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("name", OPS)
def test_vmap_and_vmap_of_grad(name: str, size: int, dims: str, native: str) -> None:
    for shape in [s for s in OPS[name].shapes() if s in ("ordinary", "one_problem", "no_batch", "no_key")]:
        check_vmap(name, native, size, dims, shape, (forward, gradient))


@on("cpu", "eager")
@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("size", [0, 1])
def test_vmap_of_drawn_dropout_over_nothing(size: int, randomness: str, native: str) -> None:
    q, y = torch.randn(size, 2, 2, 3, 4), torch.randn(2, 3, 4)

    def f(q: Tensor) -> Tensor:
        return SF.set_attention(q, q, q, y, dropout_p=0.5, backend=named(native))

    assert torch.vmap(f, randomness=randomness)(q).shape == q.shape


def check_a_few(name: str, backend: str) -> None:
    """No work at all, size 1, and saved tensors that vmap expanded."""
    for shape in ("no_batch", "ones"):
        check(name, backward_of_a_sum, named(backend), shape, OPS[name].inputs(shape, dtype_of(backend)))
    if name in ("attention_by_products", "pool") or OPS[name].function is SF.sinkhorn:
        check(name, jacobian, named(backend), "one_problem", OPS[name].inputs("one_problem", dtype_of(backend)))
    check_vmap(name, backend, 0, "all_at_0", "ordinary", (forward, gradient))
    check_vmap(name, backend, 2, "last", "one_problem", (gradient,))


NATIVE_OPS = list(OPS)


@on("eager", "triton")
@pytest.mark.parametrize("name", NATIVE_OPS)
def test_a_few(name: str, native: str) -> None:
    check_a_few(name, native)


@pytest.mark.parametrize("name", [name for name in NATIVE_OPS if "causal" not in name and name != "features"])
def test_a_few_on_cuda(name: str, cuda_backend: str) -> None:
    check_a_few(name, cuda_backend)


class CheckedCalls(TorchDispatchMode):
    """Every call of an op of the package is repeated on fake tensors: same shapes, strides and dtypes."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "setformer_kernels":
            self.checked = True
            torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))
        return op(*args, **(kwargs or {}))


@on("cpu", "eager")
@pytest.mark.parametrize("layout", ["dense", "all_expanded", "transposed"])
@pytest.mark.parametrize("name", NATIVE_OPS)
def test_fake_kernels(name: str, layout: str, native: str) -> None:
    op = OPS[name]
    for shape in ("ordinary", "ones", "no_batch"):
        tensors = tuple(map(LAYOUTS[layout], op.inputs(shape, dtype_of(native))))
        with CheckedCalls() as calls:
            backward_of_a_sum(op.call(named(native)), op.differentiable(), *tensors)
        assert calls.checked


@pytest.mark.parametrize("name", ["attention", "causal", "pool", "sinkhorn"])
def test_compiled(name: str) -> None:
    op = OPS[name]
    for shape in ("no_batch", "one_problem"):
        torch._dynamo.reset()
        compiled = torch.compile(op.call("auto"), fullgraph=True, backend="aot_eager")
        tensors = op.inputs(shape, torch.float64)
        for transform in (forward, backward_of_a_sum):
            calls = (compiled, op.call("reference"))
            found, wanted = (transform(f, op.differentiable(), *tensors) for f in calls)
            torch.testing.assert_close(found, wanted)
