"""Causal attention whose past is a state of constant size: prefill in pieces, and decoding token by token.

Letters as in `functional`; Hk heads of keys, of which queries have a multiple.  What a state holds:
`reference/state.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, ops, reference
from .arguments import Hyper, normalise
from .grouping import by_element, elements_as_heads, is_alone, repeated, repeated_stream, shared_by
from .ops.direct import Repeats, same_memory, unwatched
from .ops.operands import ready
from .problem import NO_STREAM, Operands, Options, Stream, compute_dtype, replaced
from .reference import state as layout
from .sharding import sharded
from .states import check_state, stream_of
from .tracing import leaf

__all__ = ["empty_state", "merge_states", "set_causal", "set_step"]


@leaf
def set_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    references: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    log_decay: Tensor | None = None,
    kernel: str = "rbf",
    bandwidth: Hyper = 1.0,
    epsilon: Hyper = 0.05,
    num_iters: int = 1,
    key_mask: Tensor | None = None,
    reference_log_mass: Tensor | None = None,
    key_relaxation: Hyper = 1.0,
    reference_relaxation: Hyper = 1.0,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    reference_position: Tensor | None = None,
    position_scale: Hyper = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    cp_context: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of a piece of a sequence: [B,H,L,D], [B,Hk,L,D], [B,Hk,L,E], [Hk,M,D] -> (o [B,H,L,E], state).

    `set_attention(causal=True)` of the whole sequence, piece by piece: query i sees the keys s ≤ i of this piece, and
    those whose sums `initial_state` holds.  The masses of query i are a_s e^{Γ_i − Γ_s}, Γ_i = Σ_{r≤i} `log_decay`_r: a
    gate fades all earlier keys, and its own key not at all.  Linear in L.  Pieces of any length give what one call
    gives, to rounding; bit for bit on one backend where all but the last are multiples of 192 tokens.

    Args:
        initial_state: [B, Hk, M, 2E + 3], what an earlier call left (`empty_state`, or None, where there was none);
            float32, or float64 for float64 inputs; differentiable.
        output_final_state: whether to return the state after the last key, differentiable; else None stands for it.
        log_decay: [B, Hk, L], log gates ≤ 0, differentiable; 0 keeps everything.  Values > 0 are a ValueError on the
            CPU and count as 0 elsewhere, where looking would stall the device; below −1000 they count as that.
        num_iters: T = 0 or 1, as a state is what one iteration needs.
        key_mask: [B, L] or [B, Hk, L], bool (True takes part) or float (log mass, −inf = not there; differentiable).  A
            key that takes no part leaves the state as it was, and its gate is skipped.
        dropout_p: as in `set_attention`; the weights that are dropped depend on places in this piece.
        cp_context: as in `set_attention`.  initial_state is what was before the first token of the whole sequence, and
            the state that is returned is after the last: both the same on every rank, with gradients that are each
            rank's part, as those of references.
        others: as in `set_attention`.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it wants.
    """
    if cp_context is not None:
        hyper = (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale)
        positions = (query_position, key_position, reference_position)
        return sharded(cp_context).scan(
            (query, key, value, references, hyper, key_mask, reference_log_mass, *positions),
            {"kernel": kernel, "num_iters": num_iters, "dropout_p": dropout_p, "seed": seed, "backend": backend},
            initial_state, output_final_state, log_decay,
        )  # fmt: skip
    if query is None:  # which stands for no query
        checks.tensor("query", query, "BHLD")
    x, opt = normalise(
        query, key, value, references, (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale),
        key_mask, reference_log_mass, query_position, key_position, reference_position, kernel=kernel,
        num_iters=num_iters, dropout_p=dropout_p, seed=seed, backend=backend, normalised=False,
    )  # fmt: skip
    wanted = checks.flag("output_final_state", output_final_state)
    assert query is not None
    return piece(x, opt, stream_of_piece(x, opt, key, initial_state, log_decay), wanted)


def stream_of_piece(
    x: Operands, opt: Options, key: Tensor, initial_state: Tensor | None, log_decay: Tensor | None
) -> Stream:  # fmt: skip
    """The checked state and gates of a call whose operands are checked; key: as the caller gave it."""
    assert x.query is not None
    _check_iterations("set_causal", opt)
    checks.shape("query", x.query, (None, None, key.shape[2], None), "L = S: a query for every key")
    return stream_of(x, key.shape[:3], initial_state, log_decay)


def piece(x: Operands, opt: Options, stream: Stream, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """o [B, H, L, E] and, where `wanted`, the state after the last key, of a checked call."""
    assert x.query is not None
    groups, empty = x.query.shape[1] // x.key.shape[1], x.query.shape[2] == 0
    alone = groups > 1 and is_alone(x, opt)
    if alone:
        x, stream = by_element(x), Stream(*(t if t is None else shared_by(t, groups) for t in stream))
    elif groups > 1:
        x, stream = repeated(x), repeated_stream(stream, groups)
    if empty:
        x = x._replace(key=x.key[:, :, :0], value=x.value[:, :, :0])
        o, state = reference.causal_with_state(x, opt, stream)
    else:
        o, state = scan(x, opt, stream, wanted)
    if alone:
        return elements_as_heads(o), state[:1] if wanted else None
    return o, state[:, ::groups].contiguous() if wanted else None


def scan(x: Operands, opt: Options, stream: Stream = NO_STREAM, with_state: bool = False) -> tuple[Tensor, Tensor]:
    """o [B, H, L, E] and, `with_state`, the state after the last key, of a checked call with L = S > 0."""
    chosen = ready("causal", x, opt, *stream)
    if chosen is not None:
        return ops.causal.set_causal(*x, *stream, *chosen, with_state)
    if with_state or stream is not NO_STREAM:
        return reference.causal_with_state(x, opt, stream)
    return reference.causal(x, opt), layout.empty_like(x, False)


@leaf
def set_step(
    state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    references: Tensor,
    *,
    state_indices: Tensor | None = None,
    log_decay: Tensor | None = None,
    kernel: str = "rbf",
    bandwidth: Hyper = 1.0,
    epsilon: Hyper = 0.05,
    num_iters: int = 1,
    key_mask: Tensor | None = None,
    reference_log_mass: Tensor | None = None,
    key_relaxation: Hyper = 1.0,
    reference_relaxation: Hyper = 1.0,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    reference_position: Tensor | None = None,
    position_scale: Hyper = 1.0,
    backend: str = "auto",
) -> Tensor:
    """One token of each sequence: [B,H,D], [B,Hk,D], [B,Hk,E], [Hk,M,D] -> o [B,H,E]; `state` is updated in place.

    `set_causal` of one token.  Time and memory do not depend on how many tokens came before.

    Args:
        state: [N, Hk, M, 2E + 3], contiguous, float32, or float64 for float64 inputs; N = B without `state_indices`.
        state_indices: int32 [B], which of the N states each token continues, all different; −1: none, and o = 0.
            Values are checked on the CPU alone.
        log_decay: [B, Hk];  key_mask: [B] or [B, Hk];  query_position, key_position: [P] or [B, P].
        others: as in `set_causal`, without dropout.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it wants.
        ValueError: where an input requires a gradient, which a state that is written over cannot give.
    """
    given = (state, query, key, value, references, state_indices, log_decay, key_mask)
    hyper = (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale)
    places, facts = (query_position, key_position, reference_position), None
    if query_position is key_position is reference_position is reference_log_mass is None:
        facts = _repeats.facts((kernel, num_iters, backend, *hyper), given)
    if facts is not None and (answer := _repeats.get(facts)) is not None and (o := answer(*given)) is not None:
        return o
    options = {"kernel": kernel, "num_iters": num_iters, "backend": backend}
    x, opt, gates = _checked_step(given, hyper, reference_log_mass, places, options)
    o = _step(x, opt, state, gates, state_indices)
    if facts is not None and facts not in _repeats:
        _repeats.keep(facts, _answer(x, opt, given, o))
    return o


_repeats = Repeats()  # of set_step


def _checked_step(
    given: tuple[Any, ...], hyper: tuple[Hyper, ...], log_mass: Tensor | None, places: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Operands, Options, Tensor | None]:  # fmt: skip
    """Operands, constants and gates of a step that passes every check; queries are the heads that share a key."""
    state, query, key, value, references, rows, log_decay, key_mask = given
    for name, t, letters in (("query", query, "BHD"), ("key", key, "BHD"), ("value", value, "BHE")):
        checks.tensor(name, t, letters)
    asking, place = _one_row("query_position", places[0], -2), _one_row("key_position", places[1], -2)
    x, opt = normalise(
        query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2), references, hyper,
        _one_row("key_mask", key_mask, -1), log_mass, asking, place, places[2], dropout_p=0.0, seed=None,
        normalised=False, **options,
    )  # fmt: skip
    _check_iterations("set_step", opt)
    b, h = key.shape[:2]
    _check_pool(state, x, b, rows)
    decay = _one_row("log_decay", log_decay, -1)
    gates = stream_of(x, (b, h, 1), None, decay).log_decay
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, *x, gates)):
        raise ValueError("set_step has no gradient: call it under torch.no_grad(), or set_causal with initial_state")
    return x if query.shape[1] == h else _grouped(x), opt, gates


def _answer(x: Operands, opt: Options, given: tuple[Any, ...], o: Tensor) -> Callable[..., Tensor | None] | None:
    """How calls that look like this one are answered, if kernels read the tensors that were given; else None."""
    state, query, key, value, references, rows, decay, mask = given
    chosen, wide = ready("causal", x, opt, state, decay, rows, mask), x.references.dtype
    as_given = same_memory((query, key, value, references), x[:4])
    as_given &= decay is None or decay.dtype == wide
    as_given &= mask is None or mask.dtype in (torch.bool, wide)
    if chosen is None or not as_given or not (rows is None or rows.is_contiguous()):
        return None
    if mask is not None:
        mask = (mask.unsqueeze(1) if mask.ndim == 1 else mask).unsqueeze(-1).expand(*x.key.shape[:2], 1)
    return ops.step.again(chosen, x, state, None if decay is None else decay.unsqueeze(-1), mask, rows, o)


def _grouped(x: Operands) -> Operands:
    """The heads [B, H, 1, D] of queries that share a key as its queries [B, Hk, G, D]."""
    assert x.query is not None
    h, groups, place = x.key.shape[1], x.query.shape[1] // x.key.shape[1], x.query_position
    place = None if place is None else place.expand(-1, -1, groups, -1)
    return replaced(x, query=x.query.squeeze(2).unflatten(1, (h, groups)), query_position=place)


def _one_row(name: str, t: Tensor | None, dim: int) -> Tensor | None:
    """What comes with one token, with its dimension of tokens."""
    if t is None:
        return None
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.ndim == 0:
        raise ValueError(f"{name} must have a dimension, got a scalar")
    return t.unsqueeze(dim)


def _step(x: Operands, opt: Options, state: Tensor, gates: Tensor | None, rows: Tensor | None) -> Tensor:
    """o [B, H, E] of a checked call, whose queries are the heads that share a key."""
    chosen = ready("causal", x, opt, state, gates, rows)
    if chosen is None:
        return ops.step.one_by_one(reference.step, x, opt, state, gates, rows).flatten(1, 2)
    return ops.step.set_step(state, *x, gates, rows, *chosen).flatten(1, 2)


def merge_states(a: Tensor, b: Tensor) -> Tensor:
    """The state [..., M, 2E + 3] of the keys of two states together, none of which fades; differentiable in both."""
    wants = "[..., M, 2E + 3]"
    if not isinstance(a, Tensor):
        raise TypeError(f"a must be a Tensor {wants}, got {type(a).__name__}")
    if a.ndim < 2 or a.shape[-1] < 3 or a.shape[-1] % 2 == 0:
        raise ValueError(f"a must have shape {wants}, got {list(a.shape)}")
    check_state("a", a, (None,) * a.ndim, a.dtype, wants)
    check_state("b", b, tuple(a.shape), a.dtype)
    checks.same_device("a", a, b=b)
    return layout.merge(a, b)


def empty_state(
    B: int, Hk: int, M: int, E: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The state [B, Hk, M, 2E + 3] of no keys: zeros."""
    sizes = [checks.integer(name, n, 0) for name, n in zip(("B", "Hk", "M", "E"), (B, Hk, M, E), strict=True)]
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}: sums in fewer digits drift")
    return torch.zeros((*sizes[:3], layout.width(sizes[3])), device=device, dtype=dtype)


def _check_iterations(name: str, opt: Options) -> None:
    if opt.num_iters > 1:
        raise ValueError(
            f"num_iters must be 0 or 1 in {name}, got {opt.num_iters}: a state holds what one iteration needs; "
            "set_attention(causal=True) takes any"
        )


def _check_pool(state: Tensor, x: Operands, b: int, indices: Tensor | None) -> None:
    """The states that a step writes, and which of them."""
    rows = b if indices is None else None
    sizes = (rows, x.key.shape[1], x.references.shape[1], layout.width(x.value.shape[-1]))
    check_state("state", state, sizes, compute_dtype(x.key.dtype))
    checks.same_device("key", x.key, state=state, state_indices=indices)
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous, got strides {list(state.stride())}")
    if indices is None:
        return
    if not isinstance(indices, Tensor) or indices.dtype != torch.int32:
        raise TypeError(f"state_indices must be an int32 Tensor [B], got {getattr(indices, 'dtype', type(indices))}")
    checks.shape("state_indices", indices, (b,), "B of the key")
    if indices.device.type == "cpu" and unwatched((indices,)):
        turns = [n for n in indices.tolist() if n != -1]
        if len(set(turns)) < len(turns) or not all(0 <= n < state.shape[0] for n in turns):
            raise ValueError(
                f"state_indices must be different ones of {state.shape[0]} states, or -1, got {indices.tolist()}"
            )
