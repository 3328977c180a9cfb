"""The halves of `functional.set_attention`: keys carried onto the references, and queries that read what they left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from torch import Tensor

from . import checks, ops, reference, solver
from .arguments import Hyper, autocast, checked_hyper, hyper_tensors, normalise, numbers, seed_of, token_position
from .grouping import folded, unfolded
from .ops.memory import read, read_problem
from .ops.operands import ready
from .problem import Options, compute_dtype
from .reference import converged
from .sharding import sharded
from .tracing import leaf

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import signatures
    from .reference.converged import TransportInfo


class SetMemory(NamedTuple):
    """What the keys left on the references, float32 (float64 of float64 tokens): its size does not depend on S."""

    z: Tensor  # [B, Hk, M, E] pooled values
    g: Tensor  # [B, Hk, M] dual potentials, −inf where no key takes part


@overload
def set_transport(
    key: Tensor, value: Tensor, references: Tensor, *, return_info: Literal[False] = ...,
    **options: Unpack[signatures.Transport],
) -> SetMemory: ...  # fmt: skip
@overload
def set_transport(
    key: Tensor, value: Tensor, references: Tensor, *, return_info: Literal[True],
    **options: Unpack[signatures.Transport],
) -> tuple[SetMemory, TransportInfo]: ...  # fmt: skip
@overload
def set_transport(
    key: Tensor, value: Tensor, references: Tensor, *, return_info: bool,
    **options: Unpack[signatures.Transport],
) -> Any: ...  # fmt: skip
@leaf
def set_transport(
    key: Tensor,
    value: Tensor,
    references: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: Hyper = 1.0,
    epsilon: Hyper = 0.05,
    num_iters: int = 1,
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
    """The first half of `set_attention`: [B,Hk,S,D], [B,Hk,S,E], [Hk,M,D] -> (z [B,Hk,M,E], g [B,Hk,M]), O(S·M).

    z_j = Σ_s W^k_sj v_s, and g = g^T, the dual potentials that T iterations leave: log b − λ_b c^T (T = 0: log b).
    `set_read` of it is `set_attention`, bit for bit on each backend; both are differentiable.  Where no key takes part
    z = 0 and g = −inf.  Arguments and errors as in `set_attention`; with return_info the result is (memory,
    `TransportInfo` of [B, Hk]).  With cp_context the memory, the same on every rank, is that of the keys of all ranks,
    g but for a constant of each head, which no read shows.
    """
    if cp_context is not None:
        others: dict[str, Any] = {"tol": tol, "method": method != "sinkhorn", "grad": grad != "unrolled"}
        others |= {"initial_potential": initial_potential, "return_info": return_info}
        hyper = (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale)
        z, g = sharded(cp_context).transport(
            (None, key, value, references, hyper, key_mask, reference_log_mass, None, key_position, reference_position),
            {"kernel": kernel, "num_iters": num_iters, "dropout_p": 0.0, "seed": None, "backend": backend}, others,
        )  # fmt: skip
        return SetMemory(z, g)
    x, opt = normalise(
        None, key, value, references, (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale),
        key_mask, reference_log_mass, None, key_position, reference_position,
        kernel=kernel, num_iters=num_iters, dropout_p=0.0, seed=None, backend=backend,
    )  # fmt: skip
    if (asked := solver.asked(tol, method, grad, initial_potential, return_info)) is not None:
        found, info = solver.run("transport", converged.transport, x, opt, asked)
        return SetMemory(*found) if info is None else (SetMemory(*found), info)
    chosen = ready("transport", x, opt)
    if chosen is None:
        return SetMemory(*reference.transport(x, opt)[:2])
    return SetMemory(*ops.memory.set_transport(*x, *chosen)[:2])


@leaf
def set_read(
    query: Tensor,
    memory: SetMemory,
    references: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: Hyper = 1.0,
    epsilon: Hyper = 0.05,
    query_position: Tensor | None = None,
    reference_position: Tensor | None = None,
    position_scale: Hyper = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The second half of `set_attention`: [B,H,L,D], memory, [Hk,M,D] -> [B,H,L,E], O(L·M) whatever S was.

    o_i = Σ_j softmax_j(ℓ(q_i, y_j) + g_j) z_j, in the dtype of the queries; 0 where every g_j is −inf.

    Args:
        query: H is a multiple of the memory's Hk: head h reads that of h // (H / Hk).
        memory: a `SetMemory`, or another pair (z [B, Hk, M, E], g [B, Hk, M]), float32 (float64 for float64 queries).
        references, kernel, bandwidth, epsilon, reference_position, position_scale: those the keys were carried with.
        query_position, dropout_p, seed, backend: as in `set_attention`.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it wants.
    """
    z, g = _checked_memory(query, memory, references)
    b, h = z.shape[:2]
    hyper = checked_hyper((bandwidth, epsilon, 1.0, 1.0, position_scale), h)
    plain = checks.kernel(kernel), 1, checks.probability("dropout_p", dropout_p), checks.text("backend", backend)
    opt = Options(tuple(numbers(hyper)), *plain)
    length, m = query.shape[2], references.shape[1]
    checks.positions({"query_position": (query_position, b, length)}, reference_position, h, m)
    others = {"query_position": query_position, "reference_position": reference_position}
    checks.same_device("query", query, bandwidth=hyper[0], epsilon=hyper[1], position_scale=hyper[4], **others)
    (query,) = autocast(query)
    dtype = compute_dtype(query.dtype)
    for name, t in (("memory.z", z), ("memory.g", g)):
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, as queries of {query.dtype} take it, got {t.dtype}")
    beta, eps, _, _, tau = hyper_tensors(hyper, h, dtype)
    given: dict[str, Tensor | None] = {
        "references": references.to(dtype),
        "bandwidth": beta,
        "epsilon": eps,
        "position_scale": tau,
        "query_position": None if query_position is None else token_position(query_position, b, h, dtype),
        "reference_position": None if reference_position is None else reference_position.to(dtype),
        "seed": seed_of(seed, opt.dropout_p, query),
    }
    x = read_problem(query, z, given)
    return read(x, opt, z, g) if query.shape[1] == h else unfolded(read(folded(x), opt, z, g), query)


def _checked_memory(query: Any, memory: Any, references: Any) -> tuple[Tensor, Tensor]:
    """z and g of a memory that fits the queries and the references."""
    checks.tensor("query", query, "BHLD")
    checks.tensor("references", references, "HMD")
    if not isinstance(memory, (tuple, list)) or len(memory) != 2:
        raise TypeError(f"memory must be a SetMemory (z, g), got {type(memory).__name__}")
    z, g = memory
    checks.tensor("memory.z", z, "BHME")
    checks.tensor("memory.g", g, "BHM")
    (b, heads, _, d), (_, h, m, _) = query.shape, z.shape
    checks.nonempty("query", query, "HD", (heads, d))
    checks.nonempty("memory.z", z, "HME", z.shape[1:])
    checks.shape("memory.z", z, (b, None, None, None), "B of the query")
    checks.shape("memory.g", g, (b, h, m), "B, H and M of memory.z")
    checks.heads("query", query, "memory", h)
    checks.shape("references", references, (h, m, d), "H and M of the memory, D of the query")
    checks.same_device("query", query, references=references, **{"memory.z": z, "memory.g": g})
    return z, g
