"""What the modules may be given; every refusal keeps the key words of the message of nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, solver
from ..dispatch import available_backends

VALUE_MAPS = ("linear", "rkhs")


class AttentionInputError(ValueError, AssertionError, RuntimeError):
    """A size, shape or mask the module refuses.

    `nn.MultiheadAttention` raises AssertionError for most of these and RuntimeError for some, where ValueError is what
    they are: this class is all three, so handlers and tests written for any of them keep working.
    """


class InputTypeError(AttentionInputError, TypeError):
    """A mask that is neither bool nor floating point, or tokens of another dtype than the weights."""


def sizes(
    embed_dim: Any, num_heads: Any, kdim: Any = None, vdim: Any = None
) -> tuple[int, int, int | None, int | None]:  # fmt: skip
    """The sizes as ints: positive, and heads that divide embed_dim."""
    embed_dim, num_heads = checks.integer("embed_dim", embed_dim), checks.integer("num_heads", num_heads)
    if embed_dim <= 0 or num_heads <= 0:
        raise AttentionInputError(
            "embed_dim and num_heads must be greater than 0,"
            f" got embed_dim={embed_dim} and num_heads={num_heads} instead"
        )
    kdim = None if kdim is None else checks.integer("kdim", kdim)
    vdim = None if vdim is None else checks.integer("vdim", vdim)
    for name, size in (("kdim", kdim), ("vdim", vdim)):
        if size is not None and size <= 0:
            raise AttentionInputError(f"{name} must be greater than 0, got {name}={size} instead")
    if embed_dim % num_heads != 0:
        raise AttentionInputError(
            f"embed_dim must be divisible by num_heads, got embed_dim={embed_dim} and num_heads={num_heads}"
        )
    return embed_dim, num_heads, kdim, vdim


def key_heads(num_heads: int, num_kv_heads: Any) -> int:
    """The number of key heads, which divides that of query heads; the same where none is given."""
    if num_kv_heads is None:
        return num_heads
    heads = checks.integer("num_kv_heads", num_kv_heads)
    if heads <= 0 or num_heads % heads != 0:
        raise AttentionInputError(f"num_kv_heads must divide num_heads, {num_heads}, got {heads}")
    return heads


def own_options(
    *, num_references: Any, num_iters: Any, epsilon: Any, bandwidth: Any, kernel: Any, value_map: Any,
    position_dim: Any, learn_epsilon: Any, learn_log_mass: Any, key_relaxation: Any, reference_relaxation: Any,
    backend: Any, position_scale: Any, tol: Any, method: Any, grad: Any,
) -> dict[str, Any]:  # fmt: skip
    """The constructor's own arguments as Python numbers and strings, by the rules of the functional API; no tensors
    among the numbers, for learned ones are asked for by learn_*."""
    num_iters = checks.iterations(num_iters)
    tol, method, grad = solver.options(tol, method, grad, num_iters)
    return {
        "tol": tol,
        "method": method,
        "grad": grad,
        "num_references": checks.integer("num_references", num_references, 1),
        "num_iters": num_iters,
        "epsilon": checks.number("epsilon", epsilon, 0.0, open_low=True),
        "bandwidth": checks.number("bandwidth", bandwidth, 0.0, open_low=True),
        "kernel": checks.kernel(kernel),
        "value_map": checks.choice("value_map", value_map, VALUE_MAPS),
        "position_dim": checks.integer("position_dim", position_dim, 0),
        "learn_epsilon": checks.flag("learn_epsilon", learn_epsilon),
        "learn_log_mass": checks.flag("learn_log_mass", learn_log_mass),
        "key_relaxation": checks.number("key_relaxation", key_relaxation, 0.0, 1.0),
        "reference_relaxation": checks.number("reference_relaxation", reference_relaxation, 0.0, 1.0),
        "backend": checks.choice("backend", backend, ("auto", *available_backends())),
        "position_scale": checks.number("position_scale", position_scale, 0.0),
    }


def check_tensors(floating: dict[str, Any], optional: dict[str, Any]) -> None:
    """By name: arguments that must be floating-point tensors, and arguments that must be tensors or None."""
    for name, tensor in floating.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be a floating-point tensor, got {tensor.dtype}")
    for name, tensor in optional.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a tensor or None, got {type(tensor).__name__}")


def check_dense(optional: dict[str, Tensor | None]) -> None:
    """By name: arguments that must not be nested where query, key and value are not."""
    for name, tensor in optional.items():
        if tensor is not None and tensor.is_nested:
            raise TypeError(f"`{name}` must be a dense tensor where the tokens are, got a NestedTensor")


def check_layout(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> bool:
    """Whether the call is batched, after checking that every tensor has the number of dims this asks for."""
    dim = query.dim()
    if dim not in (2, 3):
        raise AttentionInputError(
            f"query should be unbatched 2D or batched 3D tensor but received {dim}-D query tensor"
        )
    call = f"For {'batched' if dim == 3 else 'unbatched'} ({dim}-D) `query`, expected"
    if key.dim() != dim or value.dim() != dim:
        raise AttentionInputError(
            f"{call} `key` and `value` to be {dim}-D but found {key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != dim - 1:
        raise AttentionInputError(
            f"{call} `key_padding_mask` to be `None` or {dim - 1}-D but found {key_padding_mask.dim()}-D tensor instead"
        )
    if attn_mask is not None and attn_mask.dim() not in (2, 3):
        raise AttentionInputError(
            f"{call} `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D tensor instead"
        )
    return dim == 3


def check_pairs(key: Tensor, value: Tensor, packed: bool) -> None:
    """One value for every key; of the same width where one packed weight projects both."""
    if packed and key.shape != value.shape:
        raise AttentionInputError(f"key shape {tuple(key.shape)} does not match value shape {tuple(value.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise AttentionInputError(
            f"key's sequence and batch dims {tuple(key.shape[:-1])} do not match value's {tuple(value.shape[:-1])}"
        )


def check_width(name: str, x: Tensor, width: int) -> None:
    """x [..., width]."""
    if x.shape[-1] != width:
        raise AttentionInputError(
            f"was expecting embedding dimension of {width}, but got {x.shape[-1]} in {name} {tuple(x.shape)}"
        )


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """x and the weight that projects it have one dtype, or autocast gives them one."""
    if x.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise InputTypeError(f"`{name}` must have the dtype of the weights, {weight.dtype}, got {x.dtype}")


def check_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, tokens: Tensor, B: int, H: int, L: int, S: int,
    batched: bool,
) -> None:  # fmt: skip
    """Dtypes, devices and shapes of both masks of these tokens.

    key_padding_mask [B, S] or [S], attn_mask [L, S], [B·H, L, S] or [H, L, S].
    """
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and not (mask.is_floating_point() or mask.dtype == torch.bool):
            raise InputTypeError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
        if mask is not None and mask.device != tokens.device:
            raise AttentionInputError(f"{name} must be on the device of the tokens, {tokens.device}, got {mask.device}")
    if key_padding_mask is not None:
        wanted = (B, S) if batched else (S,)
        for dim, size in enumerate(wanted):
            if key_padding_mask.shape[dim] != size:
                raise AttentionInputError(
                    f"Expected `key_padded_mask.shape[{dim}]` to be {size}, but got {key_padding_mask.shape[dim]}:"
                    f" key_padding_mask is {tuple(key_padding_mask.shape)} and should be {wanted}"
                )
    if attn_mask is None:
        return
    allowed = (L, S) if attn_mask.dim() == 2 else (B * H, L, S) if batched else (H, L, S)
    if tuple(attn_mask.shape) != allowed:
        if attn_mask.dim() == 3 and not batched:
            raise AttentionInputError(f"Expected `attn_mask` shape to be {allowed} but got {tuple(attn_mask.shape)}")
        raise AttentionInputError(
            f"The shape of the {attn_mask.dim()}D attn_mask is {tuple(attn_mask.shape)}, but should be {allowed}."
        )


def check_key_position(position: Any, B: int, S: int, P: int) -> None:
    """None, or a tensor [S, P] or [B, S, P] where P > 0."""
    check_tensors({}, {"key_position": position})
    if position is None:
        return
    if P == 0:
        raise ValueError("key_position given, but the module was built with position_dim=0")
    if tuple(position.shape) not in ((S, P), (B, S, P)):
        raise ValueError(f"key_position must have shape {[S, P]} or {[B, S, P]}, got {list(position.shape)}")
