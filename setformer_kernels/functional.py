"""The functional API: broadcast, validate, choose reference or native, call.

Letters: B batch, H heads, L queries, S keys, M references, D head dim, E value head dim, R landmarks, P position
coordinates, T = num_iters.  x̂ = x/‖x‖, and 0 with zero gradient where ‖x‖ ≤ 1e-12.  Source: SeTformer (arXiv
2401.03540) on OTKE (ICLR 2021, arXiv 2006.12065).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import advice, checks, dispatch, ops, packed, reference, solver, streaming
from .arguments import Hyper, from_options, normalise, query_mask
from .features import nystrom_features
from .grouping import folded, repeated, unfolded, with_own_keys
from .memory import SetMemory, set_read, set_transport
from .ops.direct import Repeats, same_memory
from .ops.operands import attention_problem, logits, ready
from .packed import set_attention_varlen, set_pool_varlen
from .pooling import set_pool
from .problem import Operands, Options, replaced
from .reference import converged
from .reference.converged import TransportInfo
from .sharding import sharded
from .sinkhorn import sinkhorn
from .streaming import empty_state, merge_states, set_causal, set_step
from .tracing import leaf

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import signatures

__all__ = [
    "SetMemory",
    "TransportInfo",
    "empty_state",
    "merge_states",
    "nystrom_features",
    "set_attention",
    "set_attention_varlen",
    "set_attention_weights",
    "set_causal",
    "set_pool",
    "set_pool_varlen",
    "set_read",
    "set_step",
    "set_transport",
    "sinkhorn",
]


@overload
def set_attention(
    query: Tensor, key: Tensor, value: Tensor, references: Tensor, *, return_info: Literal[False] = ...,
    **options: Unpack[signatures.Attention],
) -> Tensor: ...  # fmt: skip
@overload
def set_attention(
    query: Tensor, key: Tensor, value: Tensor, references: Tensor, *, return_info: Literal[True],
    **options: Unpack[signatures.Attention],
) -> tuple[Tensor, TransportInfo]: ...  # fmt: skip
@overload
def set_attention(
    query: Tensor, key: Tensor, value: Tensor, references: Tensor, *, return_info: bool,
    **options: Unpack[signatures.Attention],
) -> Any: ...  # fmt: skip
@leaf
def set_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    references: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: Hyper = 1.0,
    epsilon: Hyper = 0.05,
    num_iters: int = 1,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    reference_log_mass: Tensor | None = None,
    key_relaxation: Hyper = 1.0,
    reference_relaxation: Hyper = 1.0,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    reference_position: Tensor | None = None,
    position_scale: Hyper = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    tol: float | None = None,
    method: str = "sinkhorn",
    grad: str = "unrolled",
    initial_potential: Tensor | None = None,
    return_info: bool = False,
    cp_context: Any = None,
    backend: str = "auto",
) -> Any:
    """Self-optimal transport attention, linear in L and S: [B,H,L,D], [B,Hk,S,D], [B,Hk,S,E], [Hk,M,D] -> [B,H,L,E].

    H is Hk or a multiple of it: queries of head h read the keys and references of head h // (H / Hk), and whatever is
    [H] below is [Hk].

    Logits ℓ_ij = (κ(x_i, y_j) − 1)/ε − τ²‖p_i − π_j‖² with κ = exp(β(⟨x̂, ŷ⟩ − 1)) (`rbf`) or ⟨x, y⟩ (`dot`).  The
    keys, with masses a, are transported onto the references, with masses b, by T log-domain Sinkhorn iterations:
    g⁰ = log b; f^t = log a − λ_a LSE_j(ℓ + g^{t−1}); c^t = LSE_s(ℓ + f^t); g^t = log b − λ_b c^t.  Values are pooled
    along the plan, z_j = Σ_s exp(ℓ_sj + f^T_s − c^T_j) v_s, and read back by the queries with the dual potential,
    o_i = Σ_j softmax_j(ℓ(q_i, y_j) + g^T_j) z_j.  Where a query sees no key, o_i = 0.

    Args:
        query, key, value: one dtype (float32, bfloat16, float16; float64 on the reference and CPU backends), any
            strides.  Under autocast they are cast to its dtype first.  Nested tensors of the layout torch.jagged,
            [B,H,*,D], are a packed batch (`set_attention_varlen`): not padded, and o has the lengths of the query.
        references: y, [H, M, D], of any floating dtype, as all further tensors.
        bandwidth, epsilon, position_scale: β > 0, ε > 0, τ ≥ 0: floats, or tensors [H] (differentiable, not checked).
        num_iters: T ≥ 0; gradients are exact for the T iterations that ran.  Each costs a pass over the keys.  Those
            beyond the first bring the plan nearer to the optimum, and measured models nothing (`docs/quality.md`): take
            more to read plans, at a small ε and with relaxed marginals.
        key_mask: [B, S] or [B, H, S], bool (True takes part) or float (unnormalised log mass, −inf = not there;
            differentiable).
        attn_mask: [L, S], [B, L, S] or [B, H, L, S], likewise; query i is answered as if its row were its key mask.
            O(T·L·S·M) time for what the mask leaves: the one path that is not linear.  For the causal mask, without
            a gradient, give `causal=True` instead: `set_attention(q, k, v, y, causal=True)` is linear.
        causal: query i sees keys s ≤ i + S − L.  A linear scan for T ≤ 1 and L = S, else the cost of an `attn_mask`.
            A call that could be a scan but for these arguments warns once (`setformer_kernels.advice.enabled`).
        reference_log_mass: [H, M] unnormalised log b; uniform when None.
        key_relaxation, reference_relaxation: λ in [0, 1], 1 = balanced; λ = ρ/(ρ + ε) is a KL penalty of strength ρ.
        query_position, key_position: [N, P] or [B, N, P] in any unit, without gradient; a row of NaN has no position
            and gets no position term.  reference_position: [H, M, P].  All three or none.
        dropout_p: dropout on the read weights W^q; seed: int64 scalar tensor, drawn when dropout_p > 0 and None.
        tol, method, grad, initial_potential, return_info: transport to convergence, as in `sinkhorn`: each head stops
            by itself, num_iters is the most, potentials are [B, Hk, M].  For queries that all see the same keys; O(S·M)
            memory; with return_info the result is (o, `TransportInfo` of [B, Hk]).
        cp_context: of `distributed.build_cp_context`: query, key and value are this rank's tokens of a sequence that
            lies on several ranks, and so is what comes out.  Masks of all queries alike, or causal with T ≤ 1.
        backend: "auto", or a name of `available_backends()`.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it wants.
    """
    if query is None and cp_context is None:  # which stands for no query
        checks.tensor("query", query, "BHLD")
    if cp_context is not None:
        others = {"attn_mask": attn_mask, "tol": tol, "method": method != "sinkhorn", "grad": grad != "unrolled"}
        others |= {"initial_potential": initial_potential, "return_info": return_info}
        hyper = (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale)
        positions = (query_position, key_position, reference_position)
        return sharded(cp_context).attention(
            (query, key, value, references, hyper, key_mask, reference_log_mass, *positions),
            {"kernel": kernel, "num_iters": num_iters, "dropout_p": dropout_p, "seed": seed, "backend": backend},
            causal, others,
        )  # fmt: skip
    asked = solver.asked(tol, method, grad, initial_potential, return_info)
    if type(query) is not Tensor and packed.is_jagged(query, key, value):
        if asked is not None:
            solver.dense()
        return packed.jagged_attention(
            query, key, value, references, attn_mask=attn_mask, key_mask=key_mask, query_position=query_position,
            key_position=key_position, kernel=kernel, bandwidth=bandwidth, epsilon=epsilon, num_iters=num_iters,
            causal=causal, reference_log_mass=reference_log_mass, key_relaxation=key_relaxation,
            reference_relaxation=reference_relaxation, reference_position=reference_position,
            position_scale=position_scale, dropout_p=dropout_p, seed=seed, backend=backend,
        )  # fmt: skip
    hyper, given, facts = (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale), None, None
    if asked is key_mask is attn_mask is reference_log_mass is reference_position is seed is None and causal is False:
        given = (query, key, value, references)
    if (
        given is not None and query_position is key_position is None and not torch.is_grad_enabled()
        and type(query) is Tensor and query.is_cpu
    ):  # fmt: skip
        facts = _repeats.facts((kernel, num_iters, dropout_p, backend, *hyper), given)
        if facts is not None and (answer := _repeats.get(facts)) is not None and (o := answer(*given)) is not None:
            return o
    x, opt = normalise(
        query, key, value, references, hyper, key_mask, reference_log_mass, query_position, key_position,
        reference_position, kernel=kernel, num_iters=num_iters, dropout_p=dropout_p, seed=seed, backend=backend,
    )  # fmt: skip
    causal = checks.flag("causal", causal)
    if asked is not None:
        solver.same_keys(attn_mask, causal)
        return _converged(x, opt, asked)
    length, s = query.shape[2], key.shape[2]
    mask = query_mask(x, attn_mask, s)
    causal = causal and s > 0
    dense = s > 0 and (mask is not None or (causal and (opt.num_iters > 1 or length != s)))
    if dense:
        advice.slower_than_linear(mask, causal, opt.num_iters, square=length == s)
        return with_own_keys(lambda x, mask: _masked(x, opt, mask, causal), x, opt, mask)
    if causal:
        return with_own_keys(lambda x, _: streaming.scan(x, opt)[0], x, opt)
    if query.shape[1] == key.shape[1]:
        o = _attention(x, opt)
        if facts is not None and facts not in _repeats:
            _repeats.keep(facts, _answer(x, opt, given, o))
        return o
    return unfolded(_attention(folded(x), opt), query)


_repeats = Repeats()  # of set_attention


def _answer(x: Operands, opt: Options, given: Any, o: Tensor) -> Callable[..., Tensor | None] | None:
    """How calls that look like this one are answered, if a kernel reads the tensors that were given; else None."""
    chosen = ready("attention", x, opt)
    return ops.attention.again(chosen, x, o) if chosen is not None and same_memory(given, x[:4]) else None


def _converged(x: Operands, opt: Options, asked: solver.Asked) -> Any:
    """o [B, H, L, E], and what was reached if that is asked for."""
    assert x.query is not None
    grouped = x.query.shape[1] != x.key.shape[1]
    (o,), info = solver.run("attention", converged.attention, folded(x) if grouped else x, opt, asked)
    o = unfolded(o, x.query) if grouped else o
    return o if info is None else (o, info)


def _attention(x: Operands, opt: Options) -> Tensor:
    """o [B, H, L, E] of queries that all see the same keys, of as many heads as there are key heads."""
    chosen = ready("attention", x, opt)
    return reference.attention(x, opt) if chosen is None else ops.attention.set_attention(*x, *chosen)[0]


@leaf
def set_attention_weights(
    query: Tensor,
    key: Tensor,
    references: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
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
    tol: float | None = None,
    method: str = "sinkhorn",
    grad: str = "unrolled",
    initial_potential: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The dense matrix A = W^q W^kᵀ [B, H, L, S] of `set_attention` (o = A v), for inspection: O(L·S) memory.

    Non-negative, rows sum to 1 (to 0 where a query sees no key).  Arguments as in `set_attention`; with a
    query-dependent mask it is computed by the reference on every backend.
    """
    if query is None:
        checks.tensor("query", query, "BHLD")
    x, opt = normalise(
        query, key, key, references,
        (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale),
        key_mask, reference_log_mass, query_position, key_position, reference_position,
        kernel=kernel, num_iters=num_iters, dropout_p=dropout_p, seed=seed, backend=backend,
    )  # fmt: skip
    x = replaced(x, value=x.value[..., :1])  # what an op reads at least
    s, causal = key.shape[2], checks.flag("causal", causal)
    if (asked := solver.asked(tol, method, grad, initial_potential, False)) is not None:
        solver.same_keys(attn_mask, causal)
        return _converged_weights(x, opt, s, asked)[1]
    mask = query_mask(x, attn_mask, s)
    if s > 0 and (mask is not None or causal):
        dispatch.select(attention_problem("weights", x, opt), _dense_backend(backend))
        x = repeated(x) if query.shape[1] != key.shape[1] else x
        return reference.masked_weights(x, opt, mask, causal)
    return _with_weights(x, opt, s, average=False)[1]


def attention_and_weights(
    query: Tensor, key: Tensor, value: Tensor, references: Tensor, *, average: bool, **options: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, A) of `set_attention` and `set_attention_weights` under the same options, from one transport of the keys; A
    as its mean over heads [B, L, S] where `average`.  With dropout the options hold a seed."""
    if options.get("attn_mask") is not None or options.get("causal"):
        if _reads_identity(query, key, value, references, options):
            eye = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*value.shape[:2], -1, -1)
            both = set_attention(query, key, torch.cat([value, eye], -1), references, **options)
            o, a = both[..., : value.shape[-1]], both[..., value.shape[-1] :]
            return o, a.mean(1) if average else a.contiguous()
        a = set_attention_weights(query, key, references, **options)
        return set_attention(query, key, value, references, **options), a.mean(1) if average else a
    x, opt = from_options(query, key, value, references, options)
    if "tol" in options:
        o, a = _converged_weights(
            x, opt, key.shape[2], solver.Asked(options["tol"], options["method"], options["grad"], None, False)
        )
        return o, a.mean(1) if average else a
    return _with_weights(x, opt, key.shape[2], average)


# Keys up to which A = A I beside o by the CPU's kernel takes less time than A by the reference; it grows with L·S².
_MOST_IDENTITY = 512


def _reads_identity(query: Tensor, key: Tensor, value: Tensor, references: Tensor, options: dict[str, Any]) -> bool:
    """Whether A under a mask is read beside o, as values that are the identity.  A gradient of o alone would pay for
    these columns too."""
    if options.get("causal") or "tol" in options or not 0 < key.shape[2] <= _MOST_IDENTITY:
        return False
    if torch.is_grad_enabled() or query.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a traced call serves every length
        return False
    x, opt = from_options(query, key, value, references, options)
    return dispatch.choose(attention_problem("masked", x, opt), opt.backend, logits(x)) == "cpu"


def _converged_weights(x: Operands, opt: Options, s: int, asked: solver.Asked) -> list[Tensor]:
    """o [B, H, L, E] and A [B, H, L, s]."""
    assert x.query is not None
    grouped = x.query.shape[1] != x.key.shape[1]
    (o, a), _ = solver.run("attention", converged.weights, folded(x) if grouped else x, opt, asked)
    return [unfolded(t, x.query) if grouped else t for t in (o, a[..., :s])]


def _with_weights(x: Operands, opt: Options, s: int, average: bool) -> tuple[Tensor, Tensor]:
    """o and A = W^q W^kᵀ [B, H, L, s], or its mean over heads [B, L, s] as one product over heads and references."""
    assert x.query is not None
    if x.query.shape[1] != x.key.shape[1]:
        o, a = (unfolded(t, x.query) for t in _with_weights(folded(x), opt, s, False))
        return o, a.mean(1) if average else a
    chosen = ready("attention", x, opt)
    if chosen is None:
        o, a = reference.attention(x, opt), reference.weights(x, opt)[..., :s]
        return o, a.mean(1) if average else a
    o, _, _, w_q, w_k = ops.weights.set_attention_weights(*x, *chosen, average)
    w_k, dtype = w_k[:, :, :s], x.key.dtype
    # with gradients, differences of the products' gradients are what counts, which rounding would drown
    if w_q.dtype != dtype and not w_q.requires_grad:
        w_q, w_k = w_q.to(dtype), w_k.to(dtype)
    if not average:
        return o, (w_q @ w_k.mT).to(dtype)
    heads = w_q.shape[1]
    return o, (w_q.transpose(1, 2).flatten(2) @ w_k.transpose(1, 2).flatten(2).mT / heads).to(dtype)


def _masked(x: Operands, opt: Options, mask: Tensor | None, causal: bool) -> Tensor:
    """Every query with masses of its own; the reference stands for a native backend that has no kernel for this."""
    problem = attention_problem("masked", x, opt)
    named = dispatch.NATIVE.get(opt.backend)
    requested = dispatch.REFERENCE if named is not None and named.unsupported_reasons(problem) else opt.backend
    if dispatch.choose(problem, requested, logits(x)) == dispatch.REFERENCE:
        return reference.masked(x, opt, mask, causal)
    return ops.masked.set_masked(*x, mask, *opt, causal)


def _dense_backend(backend: str) -> str:
    """Weights are PyTorch on every backend: a native backend asked for by name stands for it too."""
    return "auto" if backend in dispatch.NATIVE else backend
