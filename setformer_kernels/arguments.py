"""Arguments of the functional API brought to the form of `Operands` and `Options`, checked on the way."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .problem import HYPER, Operands, Options, compute_dtype, replaced
from .reference.dense import normalise_masses

Hyper = float | Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def hyperparameters(
    values: tuple[Hyper, ...], heads: int, dtype: torch.dtype
) -> tuple[list[Tensor | None], list[float]]:
    """Each hyperparameter as a tensor [H] or as a float: (tensors, scalars), with None or an unused 1.0 elsewhere."""
    tensors = [v.to(dtype).expand(heads) if isinstance(v, Tensor) else None for v in values]
    return tensors, [1.0 if isinstance(v, Tensor) else float(v) for v in values]


def normalise(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    references: Tensor,
    hyper: tuple[Hyper, ...],
    key_mask: Tensor | None,
    reference_log_mass: Tensor | None,
    query_position: Tensor | None,
    key_position: Tensor | None,
    reference_position: Tensor | None,
    *,
    kernel: str,
    num_iters: int,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Operands, Options]:
    """Check everything, then bring it to the form of `Operands`; `hyper` is in the order of `HYPER`."""
    _check_tokens(query, key, value, references)
    (b, h, s, _), m = key.shape, references.shape[1]
    hyper = _checked_hyper(hyper, h)
    constants = (checks.kernel(kernel), checks.iterations(num_iters), checks.probability("dropout_p", dropout_p))
    _check_masses(key_mask, (b, s), reference_log_mass, (h, m))
    tokens: dict[str, Any] = {"key_position": (key_position, b, s)}
    if query is not None:
        tokens["query_position"] = (query_position, b, query.shape[2])
    checks.positions(tokens, reference_position, h, m)
    parameters = {"references": references, "reference_position": reference_position}
    others = {"key_mask": key_mask, "reference_log_mass": reference_log_mass, "query": query, "value": value}
    placed = {"query_position": query_position, "key_position": key_position, "seed": seed}
    checks.same_device("key", key, **parameters, **others, **placed, **dict(zip(HYPER, hyper, strict=True)))

    key, value, *rest = autocast(key, value, *(() if query is None else (query,)))
    dtype = compute_dtype(key.dtype)
    tensors, scalars = hyperparameters(hyper, h, dtype)
    operands = Operands(
        query=rest[0] if rest else None,
        key=key,
        value=value,
        references=references.to(dtype),
        log_a=_log_mass(key_mask, dtype, (b, h, s)),
        log_b=None if reference_log_mass is None else reference_log_mass.to(dtype).log_softmax(-1),
        **dict(zip(HYPER, tensors, strict=True)),
        query_position=_token_position(query_position, b, h, dtype),
        key_position=_token_position(key_position, b, h, dtype),
        reference_position=None if reference_position is None else reference_position.to(dtype),
        seed=_seed(seed, constants[2], key.device),
    )
    if s == 0:
        operands = _with_an_absent_key(operands)
    return operands, Options(tuple(scalars), *constants, checks.plain(backend))


def from_options(
    query: Tensor, key: Tensor, value: Tensor, references: Tensor, options: dict[str, Any]
) -> tuple[Operands, Options]:
    """`normalise` of keyword arguments of `set_attention`, of which the tensors and hyperparameters may be missing."""
    hyper = tuple(options.get(name, scalar) for name, scalar in zip(HYPER, Options().scalars, strict=True))
    tensors = ("key_mask", "reference_log_mass", "query_position", "key_position", "reference_position")
    constants = {name: options[name] for name in ("kernel", "num_iters", "dropout_p", "seed", "backend")}
    return normalise(query, key, value, references, hyper, *(options.get(name) for name in tensors), **constants)


def _with_an_absent_key(x: Operands) -> Operands:
    """No key at all is one key without mass: zeros out, and zero gradients for everything."""
    position = x.key_position
    return replaced(
        x,
        key=F.pad(x.key, (0, 0, 0, 1)),
        value=F.pad(x.value, (0, 0, 0, 1)),
        log_a=x.references.new_full((*x.key.shape[:2], 1), -math.inf),
        key_position=None if position is None else F.pad(position, (0, 0, 0, 1), value=math.nan),
    )


def _check_masses(
    key_mask: Tensor | None, keys: tuple[int, int], reference_log_mass: Tensor | None, references: tuple[int, int]
) -> None:
    if key_mask is not None:
        checks.mask("key_mask", key_mask, [keys])
    if reference_log_mass is not None:
        checks.tensor("reference_log_mass", reference_log_mass, "HM")
        checks.shape("reference_log_mass", reference_log_mass, references, "H and M of the references")


def _check_tokens(query: Tensor | None, key: Tensor, value: Tensor, references: Tensor) -> None:
    for name, t, letters in (("key", key, "BHSD"), ("value", value, "BHSE"), ("references", references, "HMD")):
        checks.tensor(name, t, letters)
    b, h, s, d = key.shape
    checks.nonempty("key", key, "HD", (h, d))
    checks.nonempty("references", references, "HMD", references.shape)
    checks.shape("value", value, (b, h, s, None), "B, H and S of the key")
    checks.shape("references", references, (h, None, d), "H and D of the key")
    checks.same_dtype("key", key, "value", value)
    if query is not None:
        checks.shape("query", query, (b, h, None, d), "B, H and D of the key")
        checks.same_dtype("key", key, "query", query)


def _checked_hyper(hyper: tuple[Hyper, ...], heads: int) -> tuple[Hyper, ...]:
    """The hyperparameters, numbers among them as floats; in the order of `HYPER`."""
    bounds = (
        (0.0, math.inf, True),
        (0.0, math.inf, True),
        (0.0, 1.0, False),
        (0.0, 1.0, False),
        (0.0, math.inf, False),
    )
    return tuple(
        checks.hyperparameter(name, value, heads, low, high, open_low)
        for name, value, (low, high, open_low) in zip(HYPER, hyper, bounds, strict=True)
    )


def _log_mass(mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int, int]) -> Tensor | None:
    """log a [B, H, S]: the log softmax of the mask over the keys that take part; −inf elsewhere."""
    if mask is None:
        return None
    log_mass, seen = normalise_masses(_additive(mask, dtype))
    return torch.where(seen, log_mass, -math.inf).unsqueeze(1).expand(shape)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as unnormalised log masses."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def query_mask(x: Operands, s: int, attn_mask: Tensor | None, causal: bool, num_iters: float) -> Tensor | None:
    """The query-dependent log masses [B or 1, H or 1, L, S] of the dense path; None where a linear path serves."""
    assert x.query is not None
    b, h, length, _ = x.query.shape
    if causal and length != s:
        raise ValueError(f"causal needs as many queries as keys, got L = {length} and S = {s}")
    if attn_mask is not None:
        checks.mask("attn_mask", attn_mask, [(length, s), (b, length, s), (b, h, length, s)])
        checks.same_device("key", x.key, attn_mask=attn_mask)
    if s == 0 or (attn_mask is None and not (causal and num_iters > 1)):
        return None
    dtype = compute_dtype(x.key.dtype)
    mask = torch.zeros((), dtype=dtype, device=x.key.device).expand(1, 1, length, s)
    if attn_mask is not None:
        mask = _additive(attn_mask, dtype)
        mask = mask[None, None] if mask.ndim == 2 else mask.unsqueeze(1) if mask.ndim == 3 else mask
    if causal:
        later = torch.ones(length, s, dtype=torch.bool, device=x.key.device).triu(1)
        mask = mask.masked_fill(later, -math.inf)
    return mask


def _token_position(position: Tensor | None, b: int, h: int, dtype: torch.dtype) -> Tensor | None:
    """[N, P] or [B, N, P] -> a view [B, H, N, P]."""
    if position is None:
        return None
    position = position.to(dtype)
    position = position[None, None] if position.ndim == 2 else position.unsqueeze(1)
    return position.expand(b, h, -1, -1)


def _seed(seed: Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The dropout seed, an int64 scalar; drawn only when dropout needs one and none is given."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.ndim != 0:
        raise TypeError("seed must be an int64 scalar Tensor")
    return seed
