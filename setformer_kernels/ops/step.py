"""The op of one token a sequence, on states that it writes.

    set_step          states [N, H, M, 2E + 3], Operands (S = 1), log_decay [B, H, 1]?, rows int32 [B]?, Options
                      -> o [B, H, L, E]

The L queries are those that share a key: all of them read the state that it left.  There is no derivative: what it
would need is written over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..dispatch import Chosen
from ..problem import Operands, Options, replaced
from .direct import differentiated, unwatched
from .operands import N_OPERANDS, OPERANDS, OPTIONS, backend_of, fake_output, flops
from .registration import define

N_TENSORS = N_OPERANDS + 3
NO_GRADIENT = "set_step has no gradient: call it under torch.no_grad(), or set_causal with initial_state"


def _split(args: Sequence[Any]) -> tuple[Tensor, Operands, Tensor | None, Tensor | None, Options]:
    decay, rows = args[N_OPERANDS + 1 : N_TENSORS]
    return args[0], Operands(*args[1 : N_OPERANDS + 1]), decay, rows, Options(*args[N_TENSORS:])


def _run(*args: Any) -> Tensor:
    states, x, decay, rows, opt = _split(args)
    backend = backend_of("causal", x, opt)
    groups = getattr(backend, "STEPS_GROUPS", False)
    o = (backend.step if groups else partial(one_by_one, backend.step))(x, opt, states, decay, rows)
    if not states.is_inference():
        torch.autograd.graph.increment_version(states)
    return o


def one_by_one(
    step: Callable[..., Tensor], x: Operands, opt: Options, states: Tensor, decay: Tensor | None, rows: Tensor | None
) -> Tensor:  # fmt: skip
    """A `step` of one query for L of them: the first comes with the key, the others read the state that it left."""
    assert x.query is not None
    if x.query.shape[2] == 1:
        return step(x, opt, states, decay, rows)
    asking = x.query_position
    places = [None] * x.query.shape[2] if asking is None else asking.split(1, 2)
    queries = list(zip(x.query.split(1, 2), places, strict=True))
    first, *others = [replaced(x, query=query, query_position=place) for query, place in queries]
    absent = x.references.new_full(x.key.shape[:3], -torch.inf)
    answers = [step(first, opt, states, decay, rows)]
    answers += [step(replaced(one, log_a=absent), opt, states, None, rows) for one in others]
    return torch.cat(answers, 2)


def _mapped(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """The rule of vmap: a call for each element, which writes its states where they lie."""
    if in_dims[0] is None:
        raise ValueError("state must be mapped by vmap where what it takes in is: got one state for all elements")
    outputs = []
    for i in range(info.batch_size):
        one = (a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
        outputs.append(_op(*one))
    return torch.stack(outputs), 0


def _refuse(*args: Any) -> Tensor:
    """The kernel of the Autograd key."""
    if differentiated(args):
        raise RuntimeError(NO_GRADIENT)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*args)


def again(
    opt: Options, x: Operands, states: Tensor, decay: Tensor | None, mask: Tensor | None, rows: Tensor | None, o: Tensor
) -> Callable[..., Tensor | None] | None:
    """How calls are answered that look like one that gave o [B, H·L, E] and that nobody has to see; None: as it was.

    A function of what lies where states, query, key, value, references, rows, log_decay and mask [B, H, 1] did; it
    returns None, and does nothing, where their values have to be looked at.
    """
    registry = dispatch.NATIVE
    prepare = getattr(registry[opt.backend], "prepared_step", None) if type(opt.backend) is Chosen else None
    if prepare is None:
        return None
    sizes, strides, dtype, device = o.shape, o.stride(), o.dtype, o.device
    run = prepare(x, opt, states, decay, mask, rows is not None, o.unflatten(1, (x.key.shape[1], -1)))

    def answer(states: Tensor, *others: Tensor | None) -> Tensor | None:
        if dispatch.NATIVE is not registry:  # other backends than those there were
            return None
        o = torch.empty_strided(sizes, strides, dtype=dtype, device=device)
        addresses = [0 if t is None else t.data_ptr() for t in others]
        if not run(states.data_ptr(), *addresses, o.data_ptr(), torch.get_num_threads()):
            return None
        if not states.is_inference():
            torch.autograd.graph.increment_version(states)
        return o

    return answer


_tensors = ", ".join(f"Tensor{'?' if optional else ''} {name}" for name, (_, optional) in OPERANDS.items())
_op = define(
    "set_step",
    f"Tensor(a!) states, {_tensors}, Tensor? log_decay, Tensor? rows, {OPTIONS}",
    kernel=_run,
    fake=lambda *args: fake_output(_split(args)[1]),
    autograd=_refuse,
    mapped=_mapped,
)


def set_step(*args: Any) -> Tensor:
    """The op as this package calls it: through the dispatcher where anybody has to see it."""
    if type(args[-1]) is not Chosen and not unwatched(args[:N_TENSORS]):
        return _op(*args)
    if differentiated(args):
        raise RuntimeError(NO_GRADIENT)
    return _run(*args)


# κ of key and query, the state taking in a value, and the read.
register_flop_formula(torch.ops.setformer_kernels.set_step)(flops(1, 1, 1))
