"""Transport one pass at a time, for whoever holds a share of the keys: what goes between the passes is [B, H, M].

    column_pass   c_j = LSE_s(ℓ_sj + f_s),  f_s = log a_s − λ_a LSE_j(ℓ_sj + g_j)
    pool_pass     the same c, and z_j = Σ_s e^{ℓ_sj + f_s − c_j} v_s

from potentials g [B, H, M].  Shares r of the keys merge as c = LSE_r c_r, z = Σ_r e^{c_r − c} z_r, and
g = log b − λ_b c goes into the next pass.  `Operands.log_b` is not read, nor `Options.num_iters`.  The backwards are
those of these functions alone: from dz and dc to the gradients of the operands and dg.

A backend runs a pass as pooling of T = 1 whose log b is g.  As log b belongs to a head, every element of the batch is
made one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .ops.operands import TOKENS, backend_of, batch_as_heads, narrow
from .problem import Operands, Options


def column_pass(x: Operands, opt: Options, g: Tensor) -> Tensor:
    """c [B, H, M]."""
    return pool_pass(narrow(x), opt, g)[1]


def pool_pass(x: Operands, opt: Options, g: Tensor) -> tuple[Tensor, Tensor]:
    """z [B, H, M, E] and c [B, H, M]."""
    folded, one = batch_as_heads(x, g), opt._replace(num_iters=1, dropout_p=0.0)
    z, c = backend_of("pool", folded, one).pool(folded, one)
    return z.view(*g.shape, z.shape[-1]), c.view(g.shape)


def column_backward(
    x: Operands, opt: Options, g: Tensor, c: Tensor, d_c: Tensor, needs: Sequence[bool]
) -> tuple[Operands, Tensor]:
    """Gradients in the order of `Operands`, None where not needed, and dg [B, H, M]; no value has one."""
    x = narrow(x)
    needs = [need and name != "value" for name, need in zip(Operands._fields, needs, strict=True)]
    zero = c.new_zeros((*c.shape, x.value.shape[-1]))
    return pool_backward(x, opt, g, zero, c, zero, d_c, needs)


def pool_backward(
    x: Operands, opt: Options, g: Tensor, z: Tensor, c: Tensor, d_z: Tensor, d_c: Tensor, needs: Sequence[bool]
) -> tuple[Operands, Tensor]:
    """As `column_backward`, from the gradients of z and c."""
    (b, h, m), one = g.shape, opt._replace(num_iters=1, dropout_p=0.0)
    folded = batch_as_heads(x, g)
    wanted = dict(zip(Operands._fields, needs, strict=True)) | {"query": False, "log_b": True}
    state = z.reshape(1, b * h, m, z.shape[-1]), c.reshape(1, b * h, 1, m)
    arriving = d_z.reshape(1, b * h, m, z.shape[-1]), d_c.reshape(1, b * h, 1, m).contiguous()
    backend = backend_of("pool", folded, one, backward=True)
    found = dict(zip(Operands._fields, backend.pool_backward(folded, one, *state, *arriving, [*wanted.values()]),
                     strict=True))  # fmt: skip
    d_g = found.pop("log_b")
    for name, t in found.items():
        if t is not None:
            t = t.squeeze(0) if name in TOKENS else t
            t = t.unflatten(0, (b, h))
            found[name] = t if name in TOKENS else t.sum(0)

    return Operands._make(found.get(name) for name in Operands._fields), d_g.view(b, h, m)
