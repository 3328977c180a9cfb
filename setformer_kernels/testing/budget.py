"""The error budget: ‖fast − f64‖_F ≤ 2‖model − f64‖_F + 4u‖f64‖_F, for the output and every gradient.

`f64` is the float64 reference on the rounded inputs; `model` is the reference in float32 with every matmul operand
rounded to the input dtype; u is the rounding unit of the dtype the result is stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..reference import dense

Tensors = dict[str, Tensor]
NO_GRADIENT = ("query_position", "key_position", "seed")


def rounding_unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


class _RoundedProducts(TorchFunctionMode):
    """Rounds both operands of every matrix product to `dtype`, in the forward and the backward pass alike."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What the reference widens to float64 is out of the range of a product in any narrower dtype.
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and args[0].dtype != torch.float64:
            return _RoundedMatmul.apply(args[0], args[1], self.dtype)
        return func(*args, **(kwargs or {}))


def products_of(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Inside the block float32 products have the operands that a backend of tokens of this dtype gives them."""
    return nullcontext() if dtype == torch.float32 else _RoundedProducts(dtype)


class _RoundedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        a, b = a.to(dtype).to(a.dtype), b.to(dtype).to(b.dtype)
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        rounded = grad.to(ctx.dtype).to(grad.dtype)
        d_a, d_b = rounded @ b.mT, a.mT @ rounded
        return d_a.sum_to_size(a.shape), d_b.sum_to_size(b.shape), None


def cast(tensors: dict[str, Any], dtype: torch.dtype, tokens: torch.dtype | None = None) -> dict[str, Any]:
    """Floating tensors in `dtype`, q, k and v in `tokens`; strides kept; those with a gradient as leaves.

    All of them on the default device.
    """
    device = torch.get_default_device()

    def one(name: str, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        t = t.to(device)
        if not t.is_floating_point():
            return t
        wanted = tokens if tokens is not None and name in ("query", "key", "value") else dtype
        return t.detach().to(wanted).requires_grad_(name not in NO_GRADIENT)

    return {name: one(name, t) for name, t in tensors.items()}


def gradients(function: Callable[..., Tensor], tensors: dict[str, Any], cotangent: Tensor) -> Tensors:
    """The output (as "output") and the gradient of ⟨cotangent, output⟩ for every tensor that requires one."""
    output = function(**tensors)
    leaves = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad}
    grads = torch.autograd.grad(
        output, list(leaves.values()), cotangent.to(output.dtype), allow_unused=True, materialize_grads=True
    )
    return {"output": output.detach()} | dict(zip(leaves, grads, strict=True))


def model_inputs(
    function: Callable[..., Tensor], inputs: dict[str, Any], dtype: torch.dtype, cotangent: Tensor
) -> tuple[Tensors, Tensors]:
    """(f64, model): the float64 reference and the float32 model, on tokens in `dtype` and parameters in float32.

    There is no wider model of float64: its model runs in float32, and `sizes` scales the error.
    """
    if dtype == torch.float64:
        exact = cast(inputs, torch.float64)
        return gradients(function, exact, cotangent), gradients(function, cast(inputs, torch.float32), cotangent)
    rounded = cast(cast(inputs, torch.float32, dtype), torch.float64)
    exact = gradients(function, rounded, cotangent)
    # What a backward pass computes again may be outside this mode, and is then not rounded: nothing is computed again.
    with products_of(dtype), kept_whole():
        model = gradients(function, cast(rounded, torch.float32), cotangent)
    return exact, model


@contextmanager
def kept_whole() -> Iterator[None]:
    """The reference keeps what it would compute again in the backward pass."""
    before = dense.checkpoint
    dense.checkpoint = lambda function, *args, **options: function(*args)
    try:
        yield
    finally:
        dense.checkpoint = before


class Sizes(NamedTuple):
    """|fast − f64|, the budget by the model and |f64| of one result, entry by entry in float64; its rounding unit."""

    error: Tensor
    modelled: Tensor
    value: Tensor
    unit: float

    @property
    def norm_ratio(self) -> float:
        """Error over budget, of norms."""
        allowed = self.modelled.norm() + 4 * self.unit * self.value.norm()
        return (self.error.norm() / allowed).item() if self.error.any() else 0.0

    @property
    def typical_ratio(self) -> float:
        """Error over budget number by number, as a geometric mean: every number has the same weight, however large.

        The budget's 4u‖f64‖ is shared equally.  Below 1e-3 a number is right by chance, and counts no more for that.
        """
        allowed = self.modelled + 4 * self.unit * self.value.square().mean().sqrt()
        ratios = torch.where(self.error > 0, self.error / allowed, 0.0)
        return ratios.clamp_min(1e-3).log().mean().exp().item()


def sizes(fast: Tensors, exact: Tensors, model: Tensors) -> Iterator[tuple[str, Sizes]]:
    """The `Sizes` of every entry of `fast`: its budget is twice the model's error.

    In float64, f64 is as far from the truth as a model is, so that |fast − f64| ≤ |fast − truth| + |f64 − truth| may be
    three times the model's.
    """
    for name, result in fast.items():
        value, unit = exact[name].double(), rounding_unit(result.dtype)
        double = result.dtype == torch.float64
        scale = 3 * unit / rounding_unit(torch.float32) if double else 2.0
        modelled = scale * (model[name].double() - value).abs()
        yield name, Sizes((result.double() - value).abs(), modelled, value.abs(), unit)


def assert_within_budget(fast: Tensors, exact: Tensors, model: Tensors, what: str = "") -> None:
    """Every entry of `fast` is finite and within its budget by the model (`sizes`), plus 4u of the exact norm."""
    for name, found in sizes(fast, exact, model):
        if not found.error.isfinite().all():
            raise AssertionError(f"{what} {name}: not finite")
        if found.norm_ratio > 1:
            error = found.error.norm().item()
            raise AssertionError(f"{what} {name}: error {error:.3e}, budget {error / found.norm_ratio:.3e}")


def assert_half_of_the_digits(fast: Tensors, exact: Tensors, model: Tensors, what: str = "") -> None:
    """No error is beyond twice the model's and half of the digits, √u‖f64‖: it is rounding, not another number.

    u is that of the coarsest result: a float32 gradient of a few numbers is a sum of products of bfloat16 tokens.
    """
    all_sizes = list(sizes(fast, exact, model))
    unit = max((found.unit for _, found in all_sizes), default=0.0)
    for name, found in all_sizes:
        error, allowed = found.error.norm(), found.modelled.norm() + unit**0.5 * found.value.norm()
        if not error <= allowed:
            raise AssertionError(f"{what} {name}: error {error:.3e}, half of the digits are {allowed:.3e}")


def assert_typically_within_budget(fast: Tensors, exact: Tensors, model: Tensors, what: str = "") -> None:
    """The budget for gradients that are few numbers, each a sum over all tokens: as `Sizes.typical_ratio`.

    Their rounding errors differ by orders of magnitude, as the sums' terms do: of 300 gradients of a position scale at
    far positions three made 96 % of the squares.  A norm of them is one rounding error over another, and passes or
    fails by how a processor rounds.  A wrong number would hide in a mean of logarithms, but not from
    `assert_half_of_the_digits`.
    """
    assert_half_of_the_digits(fast, exact, model, what)
    for name, found in sizes(fast, exact, model):
        if found.typical_ratio > 1:
            raise AssertionError(f"{what} {name}: typical error {found.typical_ratio:.2f} times the budget")
