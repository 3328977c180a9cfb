"""Packed batches: sequences of any lengths one after another, without padding, in functions and nested tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch, ops, reference
from .arguments import Hyper, normalise
from .grouping import repeated, repeated_stream
from .ops.operands import attention_problem, logits
from .problem import NO_STREAM, Operands, Options, Stream, compute_dtype, is_plain, replaced
from .reference import state as layout
from .reference.dense import additive
from .sharding import sharded
from .states import packed_stream
from .tracing import leaf


@leaf
def set_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    references: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    *,
    causal: bool = False,
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
) -> Any:
    """`set_attention` of N sequences that lie one after another: [Tq,H,D], [Tk,Hk,D], [Tk,Hk,E], [Hk,M,D] -> [Tq,H,E],
    or (that, state [N,Hk,M,2E+3]) with `output_final_state`.

    Sequence n has the queries cu_seqlens_q[n] .. cu_seqlens_q[n+1] − 1 and the keys of cu_seqlens_k likewise, and is
    answered as if it were alone: its output and the gradients of its tokens are the same bits whatever stands beside
    it.  A sequence may be empty, and offsets may repeat: without keys o = 0.  Rows behind the last offset belong to
    nobody: they are never read, their outputs and gradients are 0.

    Args:
        query, key, value: as in `set_attention`, tokens before heads.
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32 or int64 on the device of the tokens: 0, then the running sum of the
            lengths; keys as queries where None.  Their values are checked on the CPU alone, where reading them waits
            for nobody.  Elsewhere the kernels keep them within the tensors, and a sequence that ends before it begins
            is empty.
        max_seqlen_q, max_seqlen_k: accepted for the sake of others' calls, and not used.
        causal: query i sees the keys s ≤ i of its sequence, in a linear scan: num_iters ≤ 1, and lengths of queries and
            keys that agree (where they cannot be checked, keys have those of queries).
        initial_state, output_final_state, log_decay: as in `set_causal`, where causal is set: [N, Hk, M, 2E + 3], what
            each sequence goes on from; whether to return what it leaves; gates [Tk, Hk].  A sequence without tokens
            passes its state on.  With any of the three, masses are taken as they are, as pieces do not know their sum.
        key_mask: [Tk] or [Tk, Hk], bool (True takes part) or float (log mass, normalised in each sequence).
        query_position, key_position: [Tq, P] and [Tk, P].
        dropout_p, seed: the random numbers of a sequence are those of `set_attention` under seed + its first query row.
        cp_context: one that was built with these offsets: those of the whole pack, of which the tokens are a shard.
            Sequences may lie on any number of ranks.  States are those of all sequences, before and after, the same on
            every rank.
        all others: as in `set_attention`.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it wants.
    """
    hyper = (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale)
    given = (query, key, value, references, hyper, key_mask, reference_log_mass, query_position, key_position,
             reference_position)  # fmt: skip
    constants = {"kernel": kernel, "num_iters": num_iters, "dropout_p": dropout_p, "seed": seed, "backend": backend}
    if cp_context is not None:
        streamed = initial_state, output_final_state, log_decay
        return sharded(cp_context).packed(given, constants, (cu_seqlens_q, cu_seqlens_k), causal, streamed)
    x, opt, cu_q, cu_k = checked_pack(given, constants, (cu_seqlens_q, cu_seqlens_k))
    causal, wanted = checks.flag("causal", causal), checks.flag("output_final_state", output_final_state)
    x = _without_keys(x) if causal and key.shape[0] == 0 else x
    stream = stream_of_pack(x, opt, cu_q, initial_state, wanted, log_decay, causal)
    if causal:
        o, states = causal_pack(x, opt, cu_q, cu_k, stream, wanted)
        return (_tokens_first(o), states) if wanted else _tokens_first(o)
    return _tokens_first(attended(x, opt, cu_q, cu_k, key.shape[0]))


def checked_pack(
    given: tuple[Any, ...], constants: Mapping[str, Any], offsets: tuple[Any, Any]
) -> tuple[Operands, Options, Tensor, Tensor]:
    """Operands [1, H, T, ..] with unnormalised log masses, options, and offsets as int64; `given` in the order of
    `arguments.normalise`."""
    query, key, value, references, hyper, key_mask, log_mass, query_position, key_position, reference_position = given
    cu_seqlens_q, cu_seqlens_k = offsets
    checks.tensor("query", query, "THD")
    _check_tokens(key, value, references)
    checks.heads("query", query, "key", key.shape[1])
    checks.shape("query", query, (None, query.shape[1], key.shape[2]), "D of the key")
    cu_q = _offsets("cu_seqlens_q", cu_seqlens_q, key)
    cu_k = cu_q if cu_seqlens_k is None else _offsets("cu_seqlens_k", cu_seqlens_k, key)
    if cu_k.shape != cu_q.shape:
        raise ValueError(
            f"cu_seqlens_k must have the shape of cu_seqlens_q, {list(cu_q.shape)}, got {list(cu_k.shape)}"
        )
    x, opt = normalise(
        _heads_first(query), _heads_first(key), _heads_first(value), references, hyper, None, log_mass,
        query_position, key_position, reference_position, **constants,
    )  # fmt: skip
    return _masked(x, key, key_mask), opt, cu_q, cu_k


def attended(x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor, keys: int) -> Tensor:
    """o [1, H, Tq, E] of a checked pack whose segments see all of their keys; keys: how many the caller gave."""
    assert x.query is not None
    queries = x.query.shape[2]
    x = repeated(x) if x.query.shape[1] != x.key.shape[1] else x
    if _is_ordinary("packed", x, opt):
        name = "cu_seqlens_q" if cu_k is cu_q else "cu_seqlens_k"
        at_q, at_k = _checked("cu_seqlens_q", cu_q, queries), _checked(name, cu_k, keys)
        return reference.packed(x, opt, at_q, at_k)
    return ops.packed.set_attention_varlen(*x, cu_q, cu_k, *opt)[0]


@leaf
def set_pool_varlen(
    key: Tensor,
    value: Tensor,
    references: Tensor,
    cu_seqlens: Tensor,
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
    backend: str = "auto",
) -> Tensor:
    """`set_pool` of N sets that lie one after another: [T,H,D], [T,H,E], [H,M,D] -> [N,H,M,E], 0 for an empty set.

    Arguments as in `set_attention_varlen`.
    """
    _check_tokens(key, value, references)
    cu = _offsets("cu_seqlens", cu_seqlens, key)
    x, opt = normalise(
        None, _heads_first(key), _heads_first(value), references,
        (bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale),
        None, reference_log_mass, None, key_position, reference_position,
        kernel=kernel, num_iters=num_iters, dropout_p=0.0, seed=None, backend=backend,
    )  # fmt: skip
    x = _masked(x, key, key_mask)
    if _is_ordinary("packed_pool", x, opt):
        return reference.packed_pool(x, opt, _checked("cu_seqlens", cu, key.shape[0]))
    return ops.packed.set_pool_varlen(*x, cu, *opt)[0].to(x.value.dtype)


def is_jagged(*tensors: Any) -> bool:
    """Whether any of them is a nested tensor of the layout torch.jagged."""
    return any(isinstance(t, Tensor) and t.is_nested and t.layout == torch.jagged for t in tensors)


def jagged_attention(
    query: Any, key: Any, value: Any, references: Tensor, *, attn_mask: Tensor | None, key_mask: Any,
    query_position: Any, key_position: Any, **options: Any,
) -> Tensor:  # fmt: skip
    """`set_attention` of jagged [N, H, *, D]; what comes with the tokens is jagged too, [N, *] and [N, *, P]."""
    if attn_mask is not None:
        raise ValueError("attn_mask must be None where the tokens are nested, got a mask")
    (q, cu_q), (k, cu_k) = _rows("query", query, 2), _rows("key", key, 2)
    at = {
        "key_mask": _beside("key_mask", key_mask, "key", key),
        "query_position": _beside("query_position", query_position, "query", query),
        "key_position": _beside("key_position", key_position, "key", key),
    }
    v = _beside("value", value, "key", key, 2)
    o = set_attention_varlen(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), references, cu_q, cu_k,
                             **at, **options)  # fmt: skip
    return torch.nested.nested_tensor_from_jagged(o.transpose(0, 1), query.offsets(), jagged_dim=2)


def jagged_pool(
    key: Any, value: Any, references: Tensor, *, key_mask: Any, key_position: Any, **options: Any
) -> Tensor:
    """`set_pool` of jagged [N, H, *, D] -> [N, H, M, E]."""
    k, cu = _rows("key", key, 2)
    at = {name: _beside(name, t, "key", key) for name, t in (("key_mask", key_mask), ("key_position", key_position))}
    v = _beside("value", value, "key", key, 2)
    return set_pool_varlen(k.transpose(0, 1), v.transpose(0, 1), references, cu, **at, **options)


def _rows(name: str, x: Any, dim: int) -> tuple[Tensor, Tensor]:
    """(values, offsets) of a jagged tensor whose lengths vary along `dim`, without gaps."""
    wants = f"{name} must be a jagged NestedTensor whose dimension {dim} has the lengths, without gaps"
    if not is_jagged(x):
        raise TypeError(f"{wants}, where others are, got {type(x).__name__}")
    if x._ragged_idx != dim or x.lengths() is not None:
        raise ValueError(f"{wants}, got {'gaps' if x.lengths() is not None else f'dimension {x._ragged_idx}'}")
    return x.values(), x.offsets()


def _beside(name: str, x: Any, other: str, y: Any, dim: int = 1) -> Any:
    """The values of x, which has the lengths of y; None stays None."""
    if x is None:
        return None
    values, offsets = _rows(name, x, dim)
    if offsets is not y.offsets() and not torch.equal(offsets, y.offsets()):
        raise ValueError(f"{name} must have the lengths of the {other}, got others")
    return values


def stream_of_pack(
    x: Operands, opt: Options, cu: Tensor, initial_state: Tensor | None, wanted: bool, log_decay: Tensor | None,
    causal: bool,
) -> Stream:  # fmt: skip
    """The checked states and gates [1, H, T] of a checked pack; ValueError for any without `causal`."""
    if not causal:
        _only_causal(initial_state=initial_state, output_final_state=wanted or None, log_decay=log_decay)
        return NO_STREAM
    _check_scan(x, opt)
    return packed_stream(x, cu, initial_state, log_decay)


def causal_pack(
    x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor, stream: Stream, with_state: bool
) -> tuple[Tensor, Tensor]:
    """o [1, H, T, E] and, `with_state`, the states [N, Hk, M, 2E + 3] after the last keys, of a checked pack."""
    length = _check_scan(x, opt)
    assert x.query is not None
    readable = cu_q.device.type == "cpu" and not torch.compiler.is_compiling()
    if cu_q is not cu_k and readable and not torch.equal(cu_q, cu_k):
        raise ValueError("cu_seqlens_k must be cu_seqlens_q where causal is set, got other offsets")
    groups = x.query.shape[1] // x.key.shape[1]
    x, stream = (repeated(x), repeated_stream(stream, groups)) if groups > 1 else (x, stream)
    if not _is_ordinary("packed_causal", x, opt):
        o, states = ops.packed.set_causal_varlen(*x, *stream, cu_q, *opt, with_state)
    else:
        checks.offsets_within("cu_seqlens_q", cu_q, length, "rows of the query")
        if is_plain(stream, with_state):
            return reference.packed_causal(x, opt, cu_q), layout.empty_like(x, False)
        o, states = reference.packed_causal_with_state(x, opt, cu_q, stream)
    return o, states[:, ::groups].contiguous()


def _check_scan(x: Operands, opt: Options) -> int:
    """How many queries, as many as keys, a scan has; ValueError for a call that is none."""
    assert x.query is not None
    length, total = x.query.shape[2], x.key.shape[2]
    if opt.num_iters > 1:
        raise ValueError(f"num_iters must be at most 1 for a causal packed batch, got {opt.num_iters}")
    if length != total:
        raise ValueError(f"query must have the T of the key, {total}, where causal is set, got {length}")
    return length


def _without_keys(x: Operands) -> Operands:
    """A scan has as many keys as queries: none, without the one that stands for none elsewhere."""
    position = None if x.key_position is None else x.key_position[:, :, :0]
    return replaced(x, key=x.key[:, :, :0], value=x.value[:, :, :0], log_a=None, key_position=position)


def _only_causal(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} goes with causal=True, got causal=False: only a scan has a state and gates")


def _is_ordinary(op: str, x: Operands, opt: Options) -> bool:
    """Whether PyTorch's own operations run: not in a graph, where they would have to read the offsets."""
    chosen = dispatch.choose(attention_problem(op, x, opt), opt.backend, logits(x))
    return chosen == dispatch.REFERENCE and not torch.compiler.is_compiling()


def _check_tokens(key: Tensor, value: Tensor, references: Tensor) -> None:
    for name, t, letters in (("key", key, "THD"), ("value", value, "THE"), ("references", references, "HMD")):
        checks.tensor(name, t, letters)
    checks.shape("value", value, (*key.shape[:2], None), "T and H of the key")
    checks.shape("references", references, (key.shape[1], None, key.shape[2]), "H and D of the key")


def _offsets(name: str, cu: Any, key: Tensor) -> Tensor:
    """cu as int64, of the right kind and place."""
    checks.offsets(name, cu)
    checks.same_device("key", key, **{name: cu})
    return cu.to(torch.int64).contiguous()


def _checked(name: str, cu: Tensor, total: int) -> Tensor:
    checks.offsets_within(name, cu, total, f"rows of the {'query' if name.endswith('_q') else 'key'}")
    return cu


def _masked(x: Operands, key: Tensor, mask: Tensor | None) -> Operands:
    """With unnormalised log masses [1, H, T] of a mask [T] or [T, H]."""
    if mask is None:
        return x
    total, h = key.shape[:2]
    checks.mask("key_mask", mask, [(total,), (total, h)])
    checks.same_device("key", key, key_mask=mask)
    log_a = additive(mask, compute_dtype(x.key.dtype))
    log_a = log_a.expand(1, h, total) if log_a.ndim == 1 else log_a.mT.unsqueeze(0)
    return replaced(x, log_a=log_a) if total > 0 else x


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, D] -> a view [1, H, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _tokens_first(o: Tensor) -> Tensor:
    """[1, H, T, E] -> a view [T, H, E]."""
    return o.squeeze(0).transpose(0, 1)
