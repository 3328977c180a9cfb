"""What the keys of a set leave on the references, as its embedding: the OTKE of ICLR 2021, arXiv 2006.12065."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from . import ops, packed, reference, solver
from .arguments import Hyper, autocast, normalise
from .memory import set_transport
from .ops.operands import ready
from .reference import converged
from .tracing import leaf

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import signatures
    from .reference.converged import TransportInfo


@overload
def set_pool(
    key: Tensor, value: Tensor, references: Tensor, *, return_info: Literal[False] = ...,
    **options: Unpack[signatures.Transport],
) -> Tensor: ...  # fmt: skip
@overload
def set_pool(
    key: Tensor, value: Tensor, references: Tensor, *, return_info: Literal[True],
    **options: Unpack[signatures.Transport],
) -> tuple[Tensor, TransportInfo]: ...  # fmt: skip
@overload
def set_pool(
    key: Tensor, value: Tensor, references: Tensor, *, return_info: bool,
    **options: Unpack[signatures.Transport],
) -> Any: ...  # fmt: skip
@leaf
def set_pool(
    key: Tensor,
    value: Tensor,
    references: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: Hyper = 1.0,
    epsilon: Hyper = 0.05,
    num_iters: int = 3,
    key_mask: Tensor | None = None,
    reference_log_mass: Tensor | None = None,
    key_relaxation: Hyper = 1.0,
    reference_relaxation: Hyper = 1.0,
    key_position: Tensor | None = None,
    reference_position: Tensor | None = None,
    position_scale: Hyper = 1.0,
    tol: float | None = None,
    method: str = "sinkhorn",
    grad: str = "unrolled",
    initial_potential: Tensor | None = None,
    return_info: bool = False,
    cp_context: Any = None,
    backend: str = "auto",
) -> Any:
    """The OTKE/SeT embedding of a set, M tokens from S: [B,H,S,D], [B,H,S,E], [H,M,D] -> [B,H,M,E].

    z_j = Σ_s W^k_sj v_s, in the dtype of the values.
    The columns of W^k = exp(ℓ + f^T − c^T) sum to 1; z = 0 where no key takes part.  Arguments as in `set_attention`;
    with return_info the result is (z, `TransportInfo` of [B, H]).  With cp_context z, the same on every rank, is
    that of the keys of all ranks.
    """
    if cp_context is not None:
        memory = set_transport(
            key, value, references, kernel=kernel, bandwidth=bandwidth, epsilon=epsilon, num_iters=num_iters,
            key_mask=key_mask, reference_log_mass=reference_log_mass, key_relaxation=key_relaxation,
            reference_relaxation=reference_relaxation, key_position=key_position, backend=backend, tol=tol,
            reference_position=reference_position, position_scale=position_scale, method=method, grad=grad,
            initial_potential=initial_potential, return_info=return_info, cp_context=cp_context,
        )  # fmt: skip
        return memory.z.to(autocast(value)[0].dtype)
    asked = solver.asked(tol, method, grad, initial_potential, return_info)
    if type(key) is not Tensor and packed.is_jagged(key, value):
        if asked is not None:
            solver.dense()
        return packed.jagged_pool(
            key, value, references, key_mask=key_mask, key_position=key_position, kernel=kernel, bandwidth=bandwidth,
            epsilon=epsilon, num_iters=num_iters, reference_log_mass=reference_log_mass, backend=backend,
            key_relaxation=key_relaxation, reference_relaxation=reference_relaxation,
            reference_position=reference_position, position_scale=position_scale,
        )  # fmt: skip
    x, opt = normalise(
        None, key, value, references, (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale),
        key_mask, reference_log_mass, None, key_position, reference_position,
        kernel=kernel, num_iters=num_iters, dropout_p=0.0, seed=None, backend=backend,
    )  # fmt: skip
    if asked is not None:
        (z,), info = solver.run("pool", converged.pool, x, opt, asked)
        return z if info is None else (z, info)
    chosen = ready("pool", x, opt)
    return reference.pool(x, opt) if chosen is None else ops.attention.set_pool(*x, *chosen)[0].to(x.value.dtype)
