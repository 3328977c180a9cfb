"""Arguments of the functional API brought to the form of `Operands` and `Options`, checked on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from . import checks
from .problem import HYPER, SCALARS, Operands, Options, Passed, compute_dtype, with_an_absent_key
from .reference.dense import additive, normalise_masses

Hyper = float | Tensor
NO_TENSORS = (None,) * len(HYPER)
CAST = frozenset((torch.float32, torch.bfloat16, torch.float16))  # what autocast brings to its own dtype


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Tokens as PyTorch's own attention takes them under autocast; what is no such tensor, as it is."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in CAST else t for t in tensors)


def hyper_tensors(values: Sequence[Hyper], heads: int, dtype: torch.dtype) -> list[Tensor | None]:
    """The hyperparameters that are tensors, as [H]; None for those that are numbers."""
    return [v.to(dtype).expand(heads) if isinstance(v, Tensor) else None for v in values]


def numbers(values: Sequence[Hyper]) -> list[float]:
    """The hyperparameters that are numbers; an unused 1.0 for those that are tensors."""
    return [1.0 if isinstance(v, Tensor) else float(v) for v in values]


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
    normalised: bool = True,
) -> tuple[Operands, Options]:
    """Check everything, then bring it to the form of `Operands`; `hyper` is in the order of `HYPER`.

    Masses are those of `key_mask` over their sum if `normalised`; a causal scan does not see a factor of all masses,
    and the pieces of a sequence do not know their sum.
    """
    if torch._C._is_any_autocast_enabled():  # before checks, as a rotation leaves queries and keys wider than values
        key, value, query = autocast(key, value, query)
    constants = (kernel, num_iters, dropout_p, backend, *hyper)
    tensors = (query, key, value, references, key_mask, reference_log_mass)
    positions = (query_position, key_position, reference_position)
    facts = _facts(constants, (*tensors, *positions))
    opt: Options | None = None if facts is None else _passed.get(facts)
    if opt is None:
        hyper, checked = _checked(constants, tensors, positions)
        opt = checked if facts is None else _remember(facts, checked)

    given = hyper if facts is None else None
    return _operands(tensors, positions, given, seed_of(seed, opt.dropout_p, key), normalised), opt


def _operands(
    tensors: tuple[Any, ...],
    positions: tuple[Any, ...],
    hyper: tuple[Hyper, ...] | None,
    seed: Tensor | None,
    normalised: bool,
) -> Operands:
    """Checked tensors, as `normalise` orders them, in their dtypes and full shapes; hyper: None if all are numbers."""
    query, key, value, references, key_mask, log_mass = tensors
    query_position, key_position, reference_position = positions
    b, h, s, _ = key.shape
    dtype = compute_dtype(key.dtype)
    beta, epsilon, lam_a, lam_b, tau = NO_TENSORS if hyper is None else hyper_tensors(hyper, h, dtype)
    operands = Operands(
        query=query,
        key=key,
        value=value,
        references=references if references.dtype == dtype else references.to(dtype),
        log_a=None if key_mask is None else _log_mass(key_mask, dtype, (b, h, s), normalised),
        log_b=None if log_mass is None else log_mass.to(dtype).log_softmax(-1),
        bandwidth=beta,
        epsilon=epsilon,
        key_relaxation=lam_a,
        reference_relaxation=lam_b,
        position_scale=tau,
        query_position=None if query_position is None else token_position(query_position, b, h, dtype),
        key_position=None if key_position is None else token_position(key_position, b, h, dtype),
        reference_position=None if reference_position is None else reference_position.to(dtype),
        seed=seed,
    )
    return with_an_absent_key(operands) if s == 0 else operands


_passed: dict[tuple[Any, ...], Passed] = {}  # the facts of calls that passed every check, and their constants
MOST_PASSED = 4096
NUMBERS, TENSORS = frozenset((float, int, str)), frozenset((Tensor, torch.nn.Parameter, NoneType))


def _facts(constants: tuple[Any, ...], tensors: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that the checks look at, types included: 1 and True are one number.

    None where they have to look for themselves: at numbers in tensors, at subclasses, or while somebody traces.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    kinds, forms = tuple(map(type, constants)), tuple(map(type, tensors))
    if torch._C._len_torch_dispatch_stack() or not (NUMBERS.issuperset(kinds) and TENSORS.issuperset(forms)):
        return None
    try:
        seen = [t if t is None else (t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in tensors]
    except RuntimeError:  # a nested tensor has no shape
        return None
    return (*constants, *kinds, *forms, *seen)


def _remember(facts: tuple[Any, ...], opt: Options) -> Passed:
    if len(_passed) >= MOST_PASSED:
        _passed.clear()
    kept = _passed[facts] = Passed(*opt)
    return kept


def _checked(
    constants: tuple[Any, ...], tensors: tuple[Any, ...], positions: tuple[Any, ...]
) -> tuple[tuple[Hyper, ...], Options]:
    """The hyperparameters and constants of a call that passes every check; arguments as `normalise` orders them."""
    kernel, num_iters, dropout_p, backend, *hyper = constants
    query, key, value, references, key_mask, reference_log_mass = tensors
    query_position, key_position, reference_position = positions
    _check_tokens(query, key, value, references)
    (b, h, s, _), m = key.shape, references.shape[1]
    checked = checked_hyper(tuple(hyper), h)
    plain = (checks.kernel(kernel), checks.iterations(num_iters), checks.probability("dropout_p", dropout_p))
    _check_masses(key_mask, (b, h, s), reference_log_mass, (h, m))
    tokens: dict[str, Any] = {"key_position": (key_position, b, s)}
    if query is not None:
        tokens["query_position"] = (query_position, b, query.shape[2])
    checks.positions(tokens, reference_position, h, m)
    parameters = {"references": references, "reference_position": reference_position}
    others = {"key_mask": key_mask, "reference_log_mass": reference_log_mass, "query": query, "value": value}
    placed = {"query_position": query_position, "key_position": key_position}
    checks.same_device("key", key, **parameters, **others, **placed, **dict(zip(HYPER, checked, strict=True)))
    return checked, Options(tuple(numbers(checked)), *plain, checks.text("backend", backend))


def from_options(
    query: Tensor, key: Tensor, value: Tensor, references: Tensor, options: dict[str, Any]
) -> tuple[Operands, Options]:
    """`normalise` of keyword arguments of `set_attention`, of which the tensors and hyperparameters may be missing."""
    hyper = tuple(options.get(name, scalar) for name, scalar in zip(HYPER, SCALARS, strict=True))
    tensors = ("key_mask", "reference_log_mass", "query_position", "key_position", "reference_position")
    constants = {name: options[name] for name in ("kernel", "num_iters", "backend")}
    constants |= {"dropout_p": options.get("dropout_p", 0.0), "seed": options.get("seed")}
    return normalise(query, key, value, references, hyper, *(options.get(name) for name in tensors), **constants)


def _check_masses(
    key_mask: Tensor | None, keys: tuple[int, int, int], reference_log_mass: Tensor | None, references: tuple[int, int]
) -> None:
    if key_mask is not None:
        checks.mask("key_mask", key_mask, [(keys[0], keys[2]), keys])
    if reference_log_mass is not None:
        checks.tensor("reference_log_mass", reference_log_mass, "HM")
        checks.shape("reference_log_mass", reference_log_mass, references, "H and M of the references")


def _check_tokens(query: Tensor | None, key: Tensor, value: Tensor, references: Tensor) -> None:
    if query is not None:
        checks.tensor("query", query, "BHLD")
    for name, t, letters in (("key", key, "BHSD"), ("value", value, "BHSE"), ("references", references, "HMD")):
        checks.tensor(name, t, letters)
    b, h, s, d = key.shape
    checks.nonempty("key", key, "HD", (h, d))
    checks.nonempty("references", references, "HMD", references.shape)
    checks.shape("value", value, (b, h, s, None), "B, H and S of the key")
    checks.nonempty("value", value, "E", value.shape[3:])
    grouped = query is not None and query.shape[1] != h
    checks.shape("references", references, (h, None, d), f"H and D of the key{', not of the query' if grouped else ''}")
    checks.same_dtype("key", key, "value", value)
    if query is not None:
        checks.heads("query", query, "key", h)
        checks.shape("query", query, (b, query.shape[1], None, d), "B and D of the key")
        checks.same_dtype("key", key, "query", query)


def checked_hyper(hyper: tuple[Hyper, ...], heads: int) -> tuple[Hyper, ...]:
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


def _log_mass(mask: Tensor, dtype: torch.dtype, shape: tuple[int, int, int], normalised: bool) -> Tensor:
    """log a [B, H, S] of a mask [B, S] or [B, H, S]: its log softmax over the keys that take part; −inf elsewhere."""
    log_mass = additive(mask, dtype)
    if normalised:
        log_mass, seen = normalise_masses(log_mass)
        log_mass = torch.where(seen, log_mass, -math.inf)
    return (log_mass.unsqueeze(1) if mask.ndim == 2 else log_mass).expand(shape)


def query_mask(x: Operands, attn_mask: Tensor | None, s: int) -> Tensor | None:
    """`attn_mask` as a view [B or 1, H or 1, L, S], bool or in the compute dtype; s: the keys the caller gave."""
    if attn_mask is None:
        return None
    assert x.query is not None
    b, h, length, _ = x.query.shape  # H of the query
    checks.mask("attn_mask", attn_mask, [(length, s), (b, length, s), (b, h, length, s)])
    checks.same_device("key", x.key, attn_mask=attn_mask)
    if attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(compute_dtype(x.key.dtype))
    if attn_mask.ndim == 2:
        return attn_mask[None, None]
    return attn_mask.unsqueeze(1) if attn_mask.ndim == 3 else attn_mask


def token_position(position: Tensor, b: int, h: int, dtype: torch.dtype) -> Tensor:
    """[N, P] or [B, N, P] -> a view [B, H, N, P]."""
    position = position.to(dtype)
    position = position[None, None] if position.ndim == 2 else position.unsqueeze(1)
    return position.expand(b, h, -1, -1)


def seed_of(seed: Tensor | None, dropout_p: float, key: Tensor) -> Tensor | None:
    """The dropout seed, an int64 scalar; drawn only when dropout needs one and none is given."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device=key.device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.ndim != 0:
        raise TypeError("seed must be an int64 scalar Tensor")
    checks.same_device("key", key, seed=seed)
    return seed
