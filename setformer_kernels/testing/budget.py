"""The error budget: ‖fast − f64‖_F ≤ 2‖model − f64‖_F + 4u‖f64‖_F, for the output and every gradient.

`f64` is the float64 reference on the rounded inputs; `model` is the reference in float32 with every matmul operand
rounded to the input dtype; u is the rounding unit of the dtype the result is stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return _RoundedMatmul.apply(args[0], args[1], self.dtype)
        return func(*args, **(kwargs or {}))


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

    There is no wider model of float64: its model runs in float32, and `assert_within_budget` scales the error.
    """
    if dtype == torch.float64:
        exact = cast(inputs, torch.float64)
        return gradients(function, exact, cotangent), gradients(function, cast(inputs, torch.float32), cotangent)
    rounded = cast(cast(inputs, torch.float32, dtype), torch.float64)
    exact = gradients(function, rounded, cotangent)
    with _RoundedProducts(dtype):
        model = gradients(function, cast(rounded, torch.float32), cotangent)
    return exact, model


def assert_within_budget(fast: Tensors, exact: Tensors, model: Tensors, what: str = "") -> None:
    """Every entry of `fast` is finite and within twice the model's error, plus 4u of the exact norm."""
    for name, result in fast.items():
        if not result.isfinite().all():
            raise AssertionError(f"{what} {name}: not finite")
        reference, unit = exact[name].double(), rounding_unit(result.dtype)
        error = (result.double() - reference).norm().item()
        modelled = (model[name].double() - reference).norm().item()
        if result.dtype == torch.float64:
            modelled *= unit / rounding_unit(torch.float32)
        allowed = 2 * modelled + 4 * unit * reference.norm().item()
        if error > allowed:
            raise AssertionError(f"{what} {name}: error {error:.3e}, budget {allowed:.3e}")
