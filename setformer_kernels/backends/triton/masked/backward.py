"""Backward of attention under a mask: nothing but the inputs is saved, the iterations run again.

Blocks of queries walk the keys (`queries_backward`, and for the iterations before the last `steps_backward`), then
blocks of keys the queries (`keys_backward`), tiles of a float mask the heads that share it (`mask_backward`), and
`tokens` takes the logits' gradients to tokens and parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....problem import Operands, Options, empty_in_order
from ..host.groups import cut_of, rule_of
from ..host.launch import device_of, launch, split_tokens
from ..host.rows import TOKENS, stride_step, strided, token_gradients, unit_rows
from ..parameters.gradients import Partials, new_partials, parameter_gradients
from .arguments import Arguments, arguments, mask_argument, pieces
from .forward import Work, flags, sums
from .keys import form_keys, seen_keys
from .keys_backward import KeyTerms, masked_keys_backward_kernel
from .mask_backward import masked_mask_backward_kernel
from .queries_backward import masked_queries_backward_kernel
from .steps_backward import masked_steps_backward_kernel
from .terms import Back
from .tokens import masked_tokens_backward_kernel
from .walks import Keys


class State(NamedTuple):
    """The workspaces of some heads."""

    keys: Keys
    work: Work
    back: Back
    terms: KeyTerms


def masked_backward(
    x: Operands, mask: Tensor | None, opt: Options, causal: bool, d_o: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `Operands` and of the mask, None where not needed, from d_o [B, H, L, E]."""
    out = token_gradients(x, dict(zip(Operands._fields, needs[:-1], strict=True)))
    rows = {name: out[name].rows if name in out else None for name in (*TOKENS, "log_a")}
    d_mask = empty_in_order(mask, mask.shape).zero_() if needs[-1] and mask is not None else None
    call = arguments(x, mask, opt, causal)
    state = new_state(call, 0, call.heads, d_mask is not None)
    d_o = unit_rows(d_o)
    queries_backward(call, state, 0, d_o)
    keys_backward(call, state, 0, d_o, rows["value"])
    if d_mask is not None:
        mask_backward(call, state, 0, d_o, d_mask)
    parts = tokens_backward(call, state, 0, rows, needs)
    found: dict[str, Tensor | None] = {name: gradient.delivered() for name, gradient in out.items()}
    found |= parameter_gradients(call.x, opt, call.prepared, parts, needs[:-1])
    return (*(found.get(name) for name in Operands._fields), d_mask)


def new_state(call: Arguments, first_head: int, heads: int, of_mask: bool) -> State:
    """The keys and the iterations of some heads, and room for what follows from them."""
    x, sizes, (_, l, s), steps = call.x, call.sizes, call.lengths, max(call.opt.num_iters, 1)
    new, mp = x.references.new_empty, sizes.MP
    keys = form_keys(call, seen_keys(call), first_head, heads)
    divisors = None if call.always else new((heads, steps, l, mp))
    work = Work(flags(call, heads), new((heads, steps, l, mp)), divisors, new((heads, l)), new((heads, l)))
    sums(call, keys, first_head, work, None)
    slots = sum(pieces(l, way.rows) for way in call.ways("masked_backward"))
    back = Back(
        new((heads, l, mp)),
        new((heads, steps, l, mp)),
        new((heads, l, mp)),
        torch.zeros((heads, slots, mp), dtype=keys.weight.dtype, device=keys.weight.device),
        torch.zeros((heads, slots), dtype=keys.weight.dtype, device=keys.weight.device),
        new((heads, l)) if of_mask else None,
    )
    return State(keys, work, back, KeyTerms(new((heads, s, mp)), new((heads, s)), new((heads, s)), new((heads, s))))


def queries_backward(call: Arguments, state: State, first_head: int, d_o: Tensor) -> None:
    """Launches the blocks of queries."""
    x, (h, l, s), steps = call.x, call.lengths, max(call.opt.num_iters, 1)
    step = stride_step(x.query, x.value, d_o)
    tokens = (*strided(x.query, step), *strided(x.value, step), *strided(x.query_position), *call.mask.strided)
    groups = (call.prepared, state.keys, call.dropout, state.work, state.back)
    first_slot, slots = 0, state.back.log_b.shape[1]
    for way in call.ways("masked_backward", x.query, x.value, d_o):
        n = pieces(l, way.rows)
        counts = (h, l, s, n, first_head, steps, first_slot, slots, call.threshold)
        args = (*tokens, *strided(d_o, step), *groups, *counts)
        programs = state.keys.weight.shape[0] * n
        launch(masked_queries_backward_kernel, programs, args, way.constants, way.tile)
        rows = (*strided(x.value, step), *call.mask.strided, *strided(d_o, step))
        args = (*rows, call.prepared, state.keys, state.work, state.back, h, l, s, n, first_head, steps)
        if steps > 1:
            constants = {name: way.constants[name] for name in ("way", "sizes", "cut")}
            launch(masked_steps_backward_kernel, programs, (*args, first_slot, slots), constants, way.tile)
        first_slot += n


def keys_backward(call: Arguments, state: State, first_head: int, d_o: Tensor, d_value: Tensor | None) -> None:
    """Launches the blocks of keys; dv in float32 where more than one of them may add to it."""
    x, (h, l, s), steps = call.x, call.lengths, max(call.opt.num_iters, 1)
    step = stride_step(x.value, d_o)
    room = d_value if d_value is None or call.always else torch.empty_like(d_value, dtype=torch.float32)
    tokens = (*strided(x.value, step), *call.mask.strided, *strided(d_o, step), *strided(room))
    groups = (call.prepared, *state)
    for way in call.ways("masked_keys_backward", x.value, d_o):
        n = pieces(s, way.keys)
        args = (*tokens, *groups, h, l, s, n, first_head, steps)
        launch(masked_keys_backward_kernel, state.keys.weight.shape[0] * n, args, way.constants, way.tile)
    if d_value is not None and room is not None and room is not d_value:
        d_value.copy_(room)


def mask_backward(call: Arguments, state: State, first_head: int, d_o: Tensor, d_mask: Tensor) -> None:
    """Launches the tiles of the mask's gradient."""
    x, (h, l, s), steps = call.x, call.lengths, max(call.opt.num_iters, 1)
    step = stride_step(x.value, d_o)
    own = d_mask.shape[:2]
    strides = [0 if n == 1 else stride for n, stride in zip(own, d_mask.stride(), strict=False)]
    given = mask_argument(call.mask.tensor)
    tokens = (*strided(x.value, step), *given.strided, *strided(d_o, step), d_mask, *strides, *d_mask.stride()[2:])
    groups = (call.prepared, state.keys, state.work, state.back)
    for way in call.ways("masked_mask_backward", x.value, d_o):
        splits = pieces(s, way.keys)
        n = pieces(l, way.rows) * splits
        args = (*tokens, *groups, h, l, s, *own, n, splits, first_head, state.keys.weight.shape[0], steps)
        launch(masked_mask_backward_kernel, own[0] * own[1] * n, args, way.constants, way.tile)


def tokens_backward(
    call: Arguments, state: State, first_head: int, out: dict[str, Tensor | None], needs: Sequence[bool]
) -> Partials:
    """Launches the gradients of queries and keys, and fills the slots of the parameters."""
    x, (h, l, s), sizes, device = call.x, call.lengths, call.sizes, device_of(call.x.key)
    assert x.query is not None
    t = call.tile("masked_far_tokens" if sizes.P else "masked_tokens")
    splits = [split_tokens(n, t, call.heads, device.multiprocessors) for n in (l, s)]
    slots = splits[0].programs + splits[1].programs
    parts = new_partials(x, call.prepared, slots, needs[:-1])
    sides = (("query", state.work.tops, 0), ("key", state.keys.weight, splits[0].programs))
    for (name, live, first_slot), split, n in zip(sides, splits, (l, s), strict=True):
        tokens, keys = getattr(x, name), name == "key"
        step = stride_step(tokens)
        rows = (*strided(tokens, step), *strided(getattr(x, name + "_position")), *strided(out[name]))
        groups = (call.prepared, live, state.back.d_logits, state.back, state.terms, parts)
        counts = (h, n, *split, first_head, first_slot, slots, state.back.log_b.shape[1])
        args = (*rows, *strided(out["log_a"] if keys else None), *groups, *counts)
        cut = cut_of(t, sizes, device, step, t.across)
        constants = {"KEYS": keys, "rule": rule_of(call.opt).compiled, "sizes": sizes.compiled, "cut": cut.compiled}
        programs = call.heads * split.programs * (sizes.DP // cut.DEPTH)
        launch(masked_tokens_backward_kernel, programs, args, constants, t)
    return parts
