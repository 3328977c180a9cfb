"""The ops of attention's two halves.

    set_transport     Operands (no query), Options -> z [B, H, M, E], g [B, H, M], c [B, H, max(T, 1), M]
    set_read          query, z, g, references, β?, ε?, τ?, positions?, seed? -> o [B, H, L, E]

g = log b − λ_b c^T (T = 0: log b), −∞ where no key takes part: a read needs neither masses nor T.  Saved for the
backward: the inputs; of the keys z and c besides, for the backward of pooling, which dg reaches through dc^T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch, reference
from ..problem import HYPER, Operands, Options
from .operands import OPERANDS, OPTIONS, POSITIONS, backend_of, fake_output, fake_state, flops, ready, split
from .registration import TOKEN, Spec, register

READ = (
    *("query", "z", "g", "references", "bandwidth", "epsilon", "position_scale"),
    *("query_position", "reference_position", "seed"),
)
OPTIONAL = READ[READ.index("bandwidth") :]
OF_OPERANDS = tuple(name for name in READ if name not in ("z", "g"))


def _run_transport(*args: Any) -> tuple[Tensor, ...]:
    x, opt = split(args)
    return backend_of("transport", x, opt).transport(x, opt)


def _run_transport_backward(d_z: Tensor, d_g: Tensor, z: Tensor, c: Tensor, *args: Any) -> Sequence[Tensor | None]:
    """That of pooling from dz and dc^T = −λ_b dg, and what dg is to log b and λ_b themselves."""
    (x, opt), needs = split(args[:-1]), args[-1]
    need = dict(zip(Operands._fields, needs, strict=True))
    last = c[:, :, -1]
    d_g = torch.where(last > -math.inf, d_g, 0.0)
    d_c = None
    if opt.num_iters > 0:
        d_c = torch.zeros_like(c)
        d_c[:, :, -1] = -_relaxation(x, opt) * d_g
    grads = list(backend_of("pool", x, opt, backward=True).pool_backward(x, opt, z, c, d_z, d_c, needs))
    direct: dict[str, Tensor] = {}
    if need["log_b"] and x.log_b is not None:
        direct["log_b"] = d_g.sum(0)
    if need["reference_relaxation"] and x.reference_relaxation is not None and opt.num_iters > 0:
        direct["reference_relaxation"] = -(d_g * torch.where(last > -math.inf, last, 0.0)).sum((0, 2))
    for name, more in direct.items():
        at = Operands._fields.index(name)
        found = grads[at]
        grads[at] = more if found is None else found + more
    return grads


def _relaxation(x: Operands, opt: Options) -> Tensor | float:
    """λ_b as a number or [H, 1]."""
    given = x.reference_relaxation
    return opt.scalars[HYPER.index("reference_relaxation")] if given is None else given.unsqueeze(-1)


def _fake_transport(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    z, c = fake_state(*split(args))
    return z, z.new_empty(z.shape[:3]), c


def read_problem(query: Tensor, z: Tensor, rest: dict[str, Tensor | None]) -> Operands:
    """The operands of a read: no key, and values [B, H, 0, E] for their width."""
    b, h, _, e = z.shape
    position = rest["query_position"]
    none: dict[str, None] = dict.fromkeys(Operands._fields)
    tokens = {"query": query, "key": query.new_empty((b, h, 0, query.shape[3])), "value": query.new_empty((b, h, 0, e))}
    given: dict[str, Tensor | None] = {**tokens, **rest}
    return Operands(**none | given | {"key_position": None if position is None else position[:, :, :0]})  # type: ignore[arg-type]


def _split_read(args: Sequence[Any]) -> tuple[Operands, Options, Tensor, Tensor]:
    given = dict(zip(READ, args, strict=False))
    scalars, kernel, dropout_p, backend = args[len(READ) :]
    query, z, g = (given.pop(name) for name in ("query", "z", "g"))
    return read_problem(query, z, given), Options(scalars, kernel, 1, dropout_p, backend), z, g


def _run_read(*args: Any) -> Tensor:
    x, opt, z, g = _split_read(args)
    return backend_of("read", x, opt).read(x, opt, z, g)


def _run_read_backward(d_o: Tensor, *args: Any) -> Sequence[Tensor | None]:
    (x, opt, z, g), needs = _split_read(args[:-1]), args[-1]
    wanted = dict(zip(READ, needs, strict=True))
    asked = [wanted.get(name, False) for name in Operands._fields]
    grads, d_z, d_g = backend_of("read", x, opt, backward=True).read_backward(x, opt, z, g, d_o, asked)
    found = dict(zip(Operands._fields, grads, strict=True)) | {"z": d_z, "g": d_g}
    return [found[name] if wanted[name] else None for name in READ]


set_transport = register(
    Spec(
        name="set_transport",
        tensors=OPERANDS,
        constants=OPTIONS,
        outputs={"z": TOKEN, "g": TOKEN, "c": TOKEN},
        differentiable=("z", "g"),
        saved=("z", "c"),
        no_grad=("query", *POSITIONS, "seed"),
        run=_run_transport,
        run_backward=_run_transport_backward,
        fake=_fake_transport,
        decomposition=lambda *args: dispatch.EAGER.transport(*split(args)),
    )
)

set_read = register(
    Spec(
        name="set_read",
        tensors={name: (TOKEN if name in ("z", "g") else OPERANDS[name][0], name in OPTIONAL) for name in READ},
        constants="float[] scalars, str kernel, float dropout_p, str backend",
        outputs={"o": TOKEN},
        differentiable=("o",),
        saved=(),
        no_grad=("query_position", "seed"),
        run=_run_read,
        run_backward=_run_read_backward,
        fake=lambda *args: fake_output(_split_read(args)[0]),
        decomposition=lambda *args: dispatch.EAGER.read(*_split_read(args)),
    )
)


def read(x: Operands, opt: Options, z: Tensor, g: Tensor) -> Tensor:
    """o [B, H, L, E] of operands without keys, as `read_problem` makes them, on what runs them."""
    chosen = ready("read", x, opt, z, g)
    if chosen is None:
        return reference.read(x, opt, z, g)
    tokens, hyper = (x.query, z, g, x.references), (x.bandwidth, x.epsilon, x.position_scale)
    constants = (opt.scalars, opt.kernel, opt.dropout_p, chosen.backend)
    return set_read(*tokens, *hyper, x.query_position, x.reference_position, x.seed, *constants)


def _read_flops(d_products: int, e_products: int, skip: int) -> Any:
    """2·B·H·M·L·(d_products·D + e_products·E), reading shapes after `skip` arguments."""

    def formula(*args: Any, out_shape: Any = None, **_: Any) -> int:
        (b, h, length, d), (_, _, m, e) = args[skip], args[skip + 1]
        return 2 * b * h * m * length * (d_products * d + e_products * e)

    return formula


# As attention's of the keys alone, whose backward has four arguments before the op's own, and of the queries alone.
register_flop_formula(torch.ops.setformer_kernels.set_transport)(flops(1, 1, 0))
register_flop_formula(torch.ops.setformer_kernels.set_transport_backward)(flops(3, 2, 4))
register_flop_formula(torch.ops.setformer_kernels.set_read)(_read_flops(1, 1, 0))
register_flop_formula(torch.ops.setformer_kernels.set_read_backward)(_read_flops(3, 2, 1))
