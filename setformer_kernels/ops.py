"""The native ops: one meaning each; the backend that runs a call is chosen inside, from real integers.

    set_attention     Operands, Options -> o [B, H, L, E], z [B, H, M, E], c [B, H, max(T, 1), M]
    set_pool          Operands (no query), Options -> z, c
    set_causal        Operands, Options (T ≤ 1) -> o
    nystrom_features  x [B, H, N, D], landmarks [H, R, D], bandwidth [H]? -> ψ [B, H, N, R]
    sinkhorn          log_kernel [G, N, M], log_a?, log_b?, λ_a [G]?, λ_b [G]? -> f, g, c [G, max(T, 1), M], iters [G]

Saved for the backward: the inputs, c and z; nothing else of length L or S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .problem import Operands, Options, Problem, Sinkhorn, compute_dtype, empty_in_order
from .registration import HEAD, SEED, TOKEN, Spec, register

N_OPERANDS = len(Operands._fields)
REQUIRED = ("key", "value", "references")
POSITIONS = ("query_position", "key_position")
OPERANDS = {
    name: (
        SEED if name == "seed" else TOKEN if name in ("query", "key", "value", "log_a", *POSITIONS) else HEAD,
        name not in REQUIRED,
    )
    for name in Operands._fields
}
OPTIONS = "float[] scalars, str kernel, int num_iters, float dropout_p, str backend"


def attention_problem(op: str, x: Operands, opt: Options) -> Problem:
    """The static facts of a call on `Operands`."""
    p = 0 if x.reference_position is None else x.reference_position.shape[-1]
    d, e, m = x.key.shape[-1], x.value.shape[-1], x.references.shape[-2]
    return Problem(op, x.key.device.type, x.key.dtype, d, e, m, p, opt.num_iters, opt.kernel, opt.dropout_p > 0)


def logits(x: Operands) -> int:
    """How many logits ℓ a call on `Operands` forms: B·H·(L + S)·M."""
    b, h, s, _ = x.key.shape
    return b * h * (s + (0 if x.query is None else x.query.shape[2])) * x.references.shape[1]


def features_problem(x: Tensor, landmarks: Tensor) -> Problem:
    return Problem("features", x.device.type, x.dtype, D=x.shape[-1], M=landmarks.shape[-2])


def sinkhorn_problem(log_kernel: Tensor, rows: int = 0, backward: bool = False) -> Problem:
    m = log_kernel.shape[-1]
    return Problem("sinkhorn", log_kernel.device.type, log_kernel.dtype, M=m, N=rows, backward=backward)


def _split(args: Sequence[Any]) -> tuple[Operands, Options]:
    return Operands(*args[:N_OPERANDS]), Options(*args[N_OPERANDS:])


def _backend(op: str, x: Operands, opt: Options, backward: bool = False) -> ModuleType:
    b, h, s, _ = x.key.shape
    length = 0 if x.query is None else x.query.shape[-2]
    problem = replace(attention_problem(op, x, opt), N=s, backward=backward, B=b, H=h, L=length)
    return dispatch.implementation(problem, opt.backend, logits(x))


def _run_attention(*args: Any) -> tuple[Tensor, ...]:
    x, opt = _split(args)
    return _backend("attention", x, opt).attention(x, opt)


def _run_attention_backward(d_o: Tensor, z: Tensor, c: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, opt = _split(args[:-1])
    return _backend("attention", x, opt, backward=True).attention_backward(x, opt, z, c, d_o, args[-1])


def _fake_state(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    b, h, _, e = x.value.shape
    m, dtype = x.references.shape[1], compute_dtype(x.key.dtype)
    z = x.key.new_empty((b, h, m, e), dtype=dtype)
    return z, x.key.new_empty((b, h, max(opt.num_iters, 1), m), dtype=dtype)


def _fake_output(x: Operands) -> Tensor:
    assert x.query is not None
    return empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))


def _fake_attention(*args: Any) -> tuple[Tensor, ...]:
    x, opt = _split(args)
    return _fake_output(x), *_fake_state(x, opt)


def _run_pool(*args: Any) -> tuple[Tensor, ...]:
    x, opt = _split(args)
    return _backend("pool", x, opt).pool(x, opt)


def _run_pool_backward(d_z: Tensor, z: Tensor, c: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, opt = _split(args[:-1])
    return _backend("pool", x, opt, backward=True).pool_backward(x, opt, z, c, d_z, None, args[-1])


def _run_causal(*args: Any) -> Tensor:
    x, opt = _split(args)
    return _backend("causal", x, opt).causal(x, opt)


def _run_causal_backward(d_o: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, opt = _split(args[:-1])
    return _backend("causal", x, opt, backward=True).causal_backward(x, opt, d_o, args[-1])


def _run_features(x: Tensor, w: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float, backend: str) -> Tensor:
    return dispatch.implementation(features_problem(x, w), backend).features(x, w, bandwidth, scalar, ridge)


def _run_features_backward(
    d_psi: Tensor,
    x: Tensor,
    w: Tensor,
    bandwidth: Tensor | None,
    scalar: float,
    ridge: float,
    backend: str,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    module = dispatch.implementation(features_problem(x, w), backend)
    return module.features_backward(x, w, bandwidth, scalar, ridge, d_psi, needs)


def _fake_features(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return empty_in_order(x, (*x.shape[:-1], w.shape[-2]))


def _run_sinkhorn(*args: Any) -> tuple[Tensor, ...]:
    x = Sinkhorn(*args[:-1])
    problem = sinkhorn_problem(x.log_kernel, x.log_kernel.shape[1])
    return dispatch.implementation(problem, args[-1]).sinkhorn(x)


def _run_sinkhorn_backward(d_f: Tensor, d_g: Tensor, c: Tensor, iters: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, (backend, needs) = Sinkhorn(*args[:-2]), args[-2:]
    problem = sinkhorn_problem(x.log_kernel, x.log_kernel.shape[1], backward=True)
    return dispatch.implementation(problem, backend).sinkhorn_backward(x, c, iters, d_f, d_g, needs)


def _fake_sinkhorn(*args: Any) -> tuple[Tensor, ...]:
    x = Sinkhorn(*args[:-1])
    (g, n, m), empty = x.log_kernel.shape, x.log_kernel.new_empty
    return empty((g, n)), empty((g, m)), empty((g, max(x.num_iters, 1), m)), empty((g,), dtype=torch.int64)


set_attention = register(
    Spec(
        name="set_attention",
        tensors=OPERANDS,
        constants=OPTIONS,
        outputs={"o": TOKEN, "z": TOKEN, "c": TOKEN},
        differentiable=("o",),
        saved=("z", "c"),
        no_grad=(*POSITIONS, "seed"),
        run=_run_attention,
        run_backward=_run_attention_backward,
        fake=_fake_attention,
        decomposition=lambda *args: dispatch.EAGER.attention(*_split(args)),
    )
)

set_pool = register(
    Spec(
        name="set_pool",
        tensors=OPERANDS,
        constants=OPTIONS,
        outputs={"z": TOKEN, "c": TOKEN},
        differentiable=("z",),
        saved=("z", "c"),
        no_grad=("query", *POSITIONS, "seed"),
        run=_run_pool,
        run_backward=_run_pool_backward,
        fake=lambda *args: _fake_state(*_split(args)),
        decomposition=lambda *args: dispatch.EAGER.pool(*_split(args)),
    )
)

set_causal = register(
    Spec(
        name="set_causal",
        tensors=OPERANDS,
        constants=OPTIONS,
        outputs={"o": TOKEN},
        differentiable=("o",),
        saved=(),
        no_grad=(*POSITIONS, "seed"),
        run=_run_causal,
        run_backward=_run_causal_backward,
        fake=lambda *args: _fake_output(_split(args)[0]),
        decomposition=lambda *args: dispatch.EAGER.causal(*_split(args)),
    )
)

nystrom_features = register(
    Spec(
        name="nystrom_features",
        tensors={"x": (TOKEN, False), "landmarks": (HEAD, False), "bandwidth": (HEAD, True)},
        constants="float scalar_bandwidth, float ridge, str backend",
        outputs={"psi": TOKEN},
        differentiable=("psi",),
        saved=(),
        no_grad=(),
        run=_run_features,
        run_backward=_run_features_backward,
        fake=_fake_features,
        decomposition=lambda *args: dispatch.EAGER.features(*args[:-1]),
    )
)

sinkhorn = register(
    Spec(
        name="sinkhorn",
        tensors={
            "log_kernel": (HEAD, False),
            "log_a": (HEAD, True),
            "log_b": (HEAD, True),
            "lam_a": (HEAD, True),
            "lam_b": (HEAD, True),
        },
        constants="float[] scalars, int num_iters, float? tol, str backend",
        outputs={"f": HEAD, "g": HEAD, "c": HEAD, "iters": HEAD},
        differentiable=("f", "g"),
        saved=("c", "iters"),
        no_grad=(),
        run=_run_sinkhorn,
        run_backward=_run_sinkhorn_backward,
        fake=_fake_sinkhorn,
        decomposition=lambda *args: dispatch.EAGER.sinkhorn(Sinkhorn(*args[:-1])),
    )
)


def _flops(d_products: int, e_products: int, skip: int) -> Any:
    """2·B·H·M·(L + S)·(d_products·D + e_products·E), reading the shapes of `Operands` after `skip` arguments."""

    def formula(*args: Any, out_shape: Any = None, **_: Any) -> int:
        shapes = Operands(*args[skip : skip + N_OPERANDS])
        b, h, s, d = shapes.key
        length = 0 if shapes.query is None else shapes.query[2]
        return 2 * b * h * shapes.references[1] * (length + s) * (d_products * d + e_products * shapes.value[3])

    return formula


def _feature_flops(products: int, skip: int) -> Any:
    """2·B·H·N·R·products·(D + R): the κ tile and the whitening product; the R³ of the landmarks is left out."""

    def formula(*args: Any, out_shape: Any = None, **_: Any) -> int:
        (b, h, n, d), (_, r, _) = args[skip], args[skip + 1]
        return 2 * b * h * n * r * products * (d + r)

    return formula


# Forward: κ and pooling for keys, κ and reading for queries.  Backward, for queries and keys alike: κ again, the
# products with z and dz, and the gradients of tokens and references.
for _name, _skip in (("set_attention", 3), ("set_pool", 3), ("set_causal", 1)):
    register_flop_formula(getattr(torch.ops.setformer_kernels, _name))(_flops(1, 1, 0))
    register_flop_formula(getattr(torch.ops.setformer_kernels, _name + "_backward"))(_flops(3, 2, _skip))
register_flop_formula(torch.ops.setformer_kernels.nystrom_features)(_feature_flops(1, 0))
register_flop_formula(torch.ops.setformer_kernels.nystrom_features_backward)(_feature_flops(3, 1))
