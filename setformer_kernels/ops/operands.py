"""What the ops on `Operands` share: schema, problem, backend, what their outputs look like, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from .. import dispatch
from ..problem import HYPER, Operands, Options, Passed, Problem, compute_dtype, empty_in_order, replaced
from .direct import unwatched
from .registration import HEAD, SEED, TOKEN

N_OPERANDS = len(Operands._fields)
REQUIRED = ("key", "value", "references")
POSITIONS = ("query_position", "key_position")
TOKENS = ("key", "value", "log_a", *POSITIONS)
PARAMETERS = ("references", "reference_position", *HYPER)
OPERANDS = {
    name: (
        SEED if name == "seed" else TOKEN if name in ("query", "key", "value", "log_a", *POSITIONS) else HEAD,
        name not in REQUIRED,
    )
    for name in Operands._fields
}
OPTIONS = "float[] scalars, str kernel, int num_iters, float dropout_p, str backend"


def attention_problem(op: str, x: Operands, opt: Options, sizes: Sequence[Any] = ()) -> Problem:
    """The static facts of a call on `Operands`; sizes: N, backward, B, H and L where they are real integers."""
    key, p = x.key, 0 if x.reference_position is None else x.reference_position.shape[-1]
    d, e, m = key.shape[-1], x.value.shape[-1], x.references.shape[-2]
    dropout = opt.dropout_p > 0
    return Problem(op, key.device.type, key.dtype, d, e, m, p, opt.num_iters, opt.kernel, dropout, *sizes)


def logits(x: Operands) -> int:
    """How many logits ℓ a call on `Operands` forms: B·H·(L + S)·M."""
    b, h, s, _ = x.key.shape
    return b * h * (s + (0 if x.query is None else x.query.shape[2])) * x.references.shape[1]


def split(args: Sequence[Any]) -> tuple[Operands, Options]:
    return Operands(*args[:N_OPERANDS]), Options(*args[N_OPERANDS:])


def sized_problem(op: str, x: Operands, opt: Options, backward: bool = False) -> Problem:
    """`attention_problem` of real tensors."""
    b, h, s, _ = x.key.shape
    return attention_problem(op, x, opt, (s, backward, b, h, 0 if x.query is None else x.query.shape[-2]))


def ready(op: str, x: Operands, opt: Options, *others: Tensor | None) -> Options | None:
    """The options to call an op with, whose further tensors are `others`; None where the reference is to run the call.

    Where nobody but autograd has to see the call they name the backend, and neither question is asked again.  Elsewhere
    sizes may be unknown, and a graph is to choose where it runs.
    """
    if not unwatched((*x, *others)):
        chosen = dispatch.choose(attention_problem(op, x, opt), opt.backend, logits(x))
        return None if chosen == dispatch.REFERENCE else opt
    if not isinstance(opt, Passed):
        return _chosen(op, x, opt)
    facts = op, x.key.dtype, x.value.shape[-1]  # what of the call its caller may have changed; autocast, the dtype
    registry, found = opt.found.get(facts, (None, None))
    if registry is not dispatch.NATIVE:
        found = _chosen(op, x, opt)
        opt.found[facts] = dispatch.NATIVE, found
    return found


def _chosen(op: str, x: Operands, opt: Options) -> Options | None:
    """`ready` of a call on real tensors."""
    name = dispatch.choose(sized_problem(op, x, opt), opt.backend, logits(x))
    return None if name == dispatch.REFERENCE else Options(*opt[:-1], dispatch.chosen_for(name, opt.backend))


def backend_of(op: str, x: Operands, opt: Options, backward: bool = False) -> ModuleType:
    if type(opt.backend) is dispatch.Chosen:
        return dispatch.NATIVE[opt.backend]
    return dispatch.implementation(sized_problem(op, x, opt, backward), opt.backend, logits(x))


def fake_state(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    b, h, _, e = x.value.shape
    m, dtype = x.references.shape[1], compute_dtype(x.key.dtype)
    z = x.key.new_empty((b, h, m, e), dtype=dtype)
    return z, x.key.new_empty((b, h, max(opt.num_iters, 1), m), dtype=dtype)


def fake_output(x: Operands) -> Tensor:
    assert x.query is not None
    return empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))


def flops(d_products: int, e_products: int, skip: int) -> Any:
    """2·B·H·M·(L + S)·(d_products·D + e_products·E), reading the shapes of `Operands` after `skip` arguments."""

    def formula(*args: Any, out_shape: Any = None, **_: Any) -> int:
        shapes = Operands(*args[skip : skip + N_OPERANDS])
        b, h, s, d = shapes.key
        length = 0 if shapes.query is None else shapes.query[2]
        return 2 * b * h * shapes.references[1] * (length + s) * (d_products * d + e_products * shapes.value[3])

    return formula


def narrow(x: Operands) -> Operands:
    """With as few values as an op reads."""
    return replaced(x, value=x.value[..., :1])


def as_heads(x: Operands) -> Operands:
    """[1, B·H, ..] and [B·H, ..]: keys are copied where batch and heads are not next to each other in memory."""
    b = x.key.shape[0]
    found: dict[str, Tensor] = {}
    for name in (*TOKENS, *PARAMETERS):  # not a comprehension that names its value: dynamo knows no cells of such
        t = getattr(x, name)
        if t is not None:
            one = name in TOKENS
            found[name] = t.flatten(0, 1).unsqueeze(0) if one else t.expand(b, *t.shape).flatten(0, 1)
    nothing: dict[str, None] = {"query": None, "query_position": None, "seed": None}
    return replaced(x, **found | nothing)


def batch_as_heads(x: Operands, g: Tensor) -> Operands:
    """`as_heads`, and potentials g [B, H, M] in the place of log b."""
    return replaced(as_heads(x), log_b=g.flatten(0, 1))
