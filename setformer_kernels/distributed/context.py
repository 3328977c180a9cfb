"""The context of a sequence whose tokens lie on several ranks, and how calls of functions are answered there."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, streaming
from ..arguments import normalise
from ..grouping import folded, unfolded
from ..packed import checked_pack, stream_of_pack
from ..problem import Operands, Options, Stream
from ..sharding import Sharded, without
from . import agreement, causal_packs, packs
from .causal import cut, scan
from .halo import set_halo, tail, tails_of
from .places import Places, counters
from .ranks import Communicator, communicator
from .shares import read, share_of, transport

LAYOUTS = ("contiguous", "zigzag")


def build_cp_context(
    cu_seqlens: Tensor | None = None,
    group: Any = None,
    *,
    layout: str = "contiguous",
    lengths: Sequence[int] | None = None,
) -> CPContext:
    """What functions take as `cp_context`: one sequence (or a pack of them) whose tokens lie on the ranks of a group.

    Every rank of the group calls this, with the same arguments, and then makes the same calls in the same order, each
    with its own tokens.  What comes out are a rank's own tokens again.  The gradients that reach parameters are each
    rank's own part; those of tokens are whole.  What is differentiated is the sum of the losses of all ranks.

    Non-causal attention costs max(T, 1) all-gathers forward and as many backward, of M·(T + E) numbers a head together
    (T = 0: M·(1 + E)); a causal scan one each way, of M·(E + 1).  None of them depends on the number of tokens.

    Args:
        cu_seqlens: [N + 1] int32 or int64, offsets of a pack in the whole sequence, for `set_attention_varlen`.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None: all processes.
        layout: "contiguous", where rank r holds the r-th piece of the sequence; or "zigzag", where it holds parts r and
            2R − 1 − r of 2R, one after the other, both of the same length.
        lengths: how many tokens each rank holds; any numbers, also 0 (even ones in "zigzag").  Where None, non-causal
            calls and contiguous scans take shards of any lengths, and zigzag the halves of each shard; dropout then
            asks for the lengths in every call.  With cu_seqlens: equal ones.

    Raises:
        ValueError, TypeError: naming the argument, on every rank; where ranks disagree, or the states of their random
            generators, on every rank as well, saying who has what.
    """
    ranks = communicator(group)
    facts: dict[str, Any] = {"layout": layout, "lengths": None if lengths is None else str(lengths)}
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64) and not cu_seqlens.is_nested:
        facts["cu_seqlens"] = _digest(cu_seqlens.detach().cpu())
    facts["seed"] = _generators()

    def build() -> CPContext:
        kind = checks.choice("layout", layout, LAYOUTS)
        offsets = None if cu_seqlens is None else _offsets(cu_seqlens)
        return CPContext(ranks, Places(kind, ranks.rank, _lengths(lengths, kind, offsets, ranks.size)), offsets)

    return agreement.agreed(ranks, {}, "build_cp_context", facts, build)[0]


def _has_dimensions(t: Any, n: int) -> bool:
    """Whether `t` is a tensor of so many dimensions, all of whose sizes are known."""
    return isinstance(t, Tensor) and not t.is_nested and t.ndim == n


def _refuse_dtensors(tensors: tuple[Any, ...]) -> None:
    """TypeError for tokens or references that DTensor shards: a context's are a rank's own."""
    module = sys.modules.get("torch.distributed.tensor")
    for name, t in zip(("query", "key", "value", "references"), tensors, strict=False):
        if module is not None and isinstance(t, module.DTensor):
            raise TypeError(f"{name} must be this rank's own Tensor with cp_context, to_local(), got a DTensor")


def _digest(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


def _generators() -> str:
    """What random numbers this process will draw, as far as seeds of dropout go."""
    states = [torch.random.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return "the generator's state " + "/".join(_digest(state) for state in states)


def _offsets(cu_seqlens: Any) -> tuple[int, ...]:
    cu = checks.offsets("cu_seqlens", cu_seqlens).cpu()
    checks.offsets_within("cu_seqlens", cu, int(cu[-1]), "tokens")
    return tuple(cu.tolist())


def _lengths(
    lengths: Any, layout: str, offsets: tuple[int, ...] | None, size: int
) -> tuple[int, ...] | None:  # fmt: skip
    """How many tokens each rank holds, where that is known."""
    pieces = 2 if layout == "zigzag" else 1
    if lengths is None:
        if offsets is None:
            return None
        if offsets[-1] % (size * pieces):
            raise ValueError(
                f"lengths must be given where the {offsets[-1]} tokens of cu_seqlens are no multiple of {size * pieces}"
            )
        return (offsets[-1] // size,) * size
    if not isinstance(lengths, Sequence):
        raise TypeError(f"lengths must be a sequence of ints, one of each rank, got {type(lengths).__name__}")
    found = tuple(checks.integer("lengths", n, 0) for n in lengths)
    if len(found) != size:
        raise ValueError(f"lengths must have a number for each of the {size} ranks, got {list(found)}")
    if any(n % pieces for n in found):
        raise ValueError(f"lengths must be even with layout='zigzag', two parts a rank, got {list(found)}")
    if offsets is not None and sum(found) != offsets[-1]:
        raise ValueError(f"lengths must sum to the {offsets[-1]} tokens of cu_seqlens, got {list(found)}")
    return found


class CPContext(Sharded):
    """See `build_cp_context`.

    Attributes:
        rank, size: this rank, and how many there are.
        places: where its tokens stand in the sequence.
        cu_seqlens: the offsets of a pack, or None.
    """

    def __init__(self, ranks: Communicator, places: Places, cu_seqlens: tuple[int, ...] | None) -> None:
        self.ranks, self.places, self.cu_seqlens = ranks, places, cu_seqlens
        self._agreed: dict[str, int] = {}
        # How many tokens there are, or were when calls were first compared: the same on every rank in either case.
        self._total = None if places.lengths is None else sum(places.lengths)

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def size(self) -> int:
        return self.ranks.size

    def __deepcopy__(self, _: Any) -> CPContext:
        return self

    def __reduce__(self) -> Any:  # what is saved has no ranks: None is loaded
        return type(None), ()

    def __repr__(self) -> str:
        return f"CPContext(rank={self.rank}, size={self.size}, {self.places})"

    def attention(
        self, tensors: tuple[Any, ...], constants: Mapping[str, Any], causal: Any, others: Mapping[str, Any]
    ) -> Tensor:  # fmt: skip
        def check() -> tuple[Operands, Options, Stream | None]:
            without(**others)
            if tensors[0] is None:  # which stands for no query
                checks.tensor("query", None, "BHLD")
            x, opt = self._normalised(tensors, constants)
            if not checks.flag("causal", causal):
                return x, opt, None
            if opt.num_iters > 1:
                raise ValueError(
                    f"num_iters must be 0 or 1 with causal and cp_context, got {opt.num_iters}: more than a scan's "
                    "is not computed over shards of the keys"
                )
            return x, opt, streaming.stream_of_piece(x, opt, tensors[1], None, None)

        x, opt, stream = self._agreed_on("set_attention", tensors, constants, check, causal=causal)
        if stream is not None:
            return self._scan(x, opt, tensors[1], stream, False)[0]
        assert x.query is not None
        z, g = self._transport(x, opt)
        grouped = x.query.shape[1] != x.key.shape[1]
        o = read(folded(x) if grouped else x, opt, z, g, self._counters(x, opt))
        return unfolded(o, x.query) if grouped else o

    def transport(
        self, tensors: tuple[Any, ...], constants: Mapping[str, Any], others: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        def check() -> tuple[Operands, Options]:
            without(**others)
            return self._normalised(tensors, constants)

        return self._transport(*self._agreed_on("transport", tensors, constants, check))

    def scan(
        self, tensors: tuple[Any, ...], constants: Mapping[str, Any], initial_state: Any, wanted: Any, log_decay: Any
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        def check() -> tuple[Operands, Options, Stream, bool]:
            if tensors[0] is None:  # which stands for no query
                checks.tensor("query", None, "BHLD")
            x, opt = self._normalised(tensors, constants)
            stream = streaming.stream_of_piece(x, opt, tensors[1], initial_state, log_decay)
            return x, opt, stream, checks.flag("output_final_state", wanted)

        given = {"initial_state": initial_state, "log_decay": log_decay, "output_final_state": wanted}
        x, opt, stream, wanted = self._agreed_on("set_causal", tensors, constants, check, **given)
        return self._scan(x, opt, tensors[1], stream, wanted)

    def packed(
        self, tensors: tuple[Any, ...], constants: Mapping[str, Any], offsets: tuple[Any, Any], causal: Any,
        streamed: tuple[Any, Any, Any],
    ) -> Any:  # fmt: skip
        initial_state, wanted, log_decay = streamed

        def check() -> tuple[Operands, Options, Stream, bool, bool]:
            x, opt, cu, _ = checked_pack(tensors, constants, offsets)
            self._check_offsets(*offsets)
            for name, t in (("query", tensors[0]), ("key", tensors[1])):
                self.places.check(name, t.shape[0])
            x = cut(x, 0, 0) if tensors[1].shape[0] == 0 else x
            scans = checks.flag("causal", causal)
            stream = stream_of_pack(x, opt, cu, initial_state, wanted, log_decay, scans)
            return x, opt, stream, scans, checks.flag("output_final_state", wanted)

        in_heads = [t.transpose(0, 1).unsqueeze(0) if _has_dimensions(t, 3) else t for t in tensors[:4]]
        alike = (*in_heads[:3], tensors[3], *tensors[4:])
        given = {"causal": causal, "initial_state": initial_state, "log_decay": log_decay, "output_final_state": wanted}
        x, opt, stream, scans, kept = self._agreed_on("set_attention_varlen", alike, constants, check, **given)
        assert self.cu_seqlens is not None
        whole, states = (self.cu_seqlens, self.places, self.ranks), None
        if scans:
            o, states = causal_packs.causal(x, opt, stream, *whole, kept)
        else:
            o = packs.attention(x, opt, *whole)
        o = o.squeeze(0).transpose(0, 1)
        return (o, states) if kept else o

    def windows(
        self, x: Tensor, reach: int, before: Tensor | None, wanted: bool
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        def check() -> None:
            self.places.check("x", x.shape[2])
            if before is not None:
                checks.shape("before", before, (*x.shape[:2], reach), "B and C of x, and what it reaches over")

        if not torch.compiler.is_compiling():
            facts = {"x": f"{x.dtype} {list(x.shape[:2])}", "reach": reach, "before": before is not None}
            agreement.agreed(self.ranks, self._agreed, "windows", facts | {"wanted": wanted}, check)
        tails = tails_of(self.places, self.places.all_lengths(x.shape[2], x.device, self.ranks), reach)
        pieces = [x[..., first:last] for first, last in self.places.pieces(x.shape[2])]
        before = x.new_zeros((*x.shape[:2], reach)) if before is None else before.to(x.dtype)
        own = torch.cat([tail(piece, reach) for piece in pieces], -1)
        halo = set_halo(own, before, *tails, wanted, self.ranks.name, "auto")
        found = [torch.cat((halo[:, :, i], piece), -1) for i, piece in enumerate(pieces)]
        return found, halo[:, :, -1] if wanted else None

    def _check_offsets(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> None:
        """ValueError for a pack that is not the context's; values are looked at on the CPU alone."""
        if self.cu_seqlens is None:
            raise ValueError("cp_context must be built with cu_seqlens for a packed batch, got one without")
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if cu is None or (cu is cu_seqlens_q and name == "cu_seqlens_k"):
                continue
            same = cu.shape[0] == len(self.cu_seqlens)
            if not same or (cu.device.type == "cpu" and tuple(cu.tolist()) != self.cu_seqlens):
                raise ValueError(f"{name} must be the cu_seqlens of the cp_context, got other offsets")

    def _scan(
        self, x: Operands, opt: Options, key: Tensor, stream: Stream, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        length, counters = key.shape[2], self._counters(x, opt)
        if length == 0:
            x = cut(x, 0, 0)
        of_rows = None
        if counters is not None:
            assert x.query is not None
            groups = x.query.shape[1] // x.key.shape[1]
            in_groups = counters.unflatten(2, (groups, length))
            of_rows = lambda first, last: in_groups[:, :, :, first:last].flatten(2, 3)  # noqa: E731
        return scan(x, opt, stream, self.places.pieces(length), self._offset(), self.ranks, wanted, of_rows)

    def _offset(self) -> float:
        """The log of how many tokens there are, or of a number that is nearly that on every rank."""
        return math.log(max(self._total or 1, 1))

    def _normalised(self, tensors: tuple[Any, ...], constants: Mapping[str, Any]) -> tuple[Operands, Options]:
        """The call's operands, with masses as they are; ValueError for shards that the context does not have."""
        found = normalise(*tensors, **constants, normalised=False)
        for name, t in (("query", tensors[0]), ("key", tensors[1])):
            if t is not None:
                self.places.check(name, t.shape[2])
        return found

    def _agreed_on(
        self, op: str, tensors: tuple[Any, ...], constants: Mapping[str, Any], check: Callable[[], Any], **others: Any
    ) -> Any:
        """What `check` returns, on every rank, or its error on every rank; `others` are said by whether they are given
        at all, or by their values where these are bools."""
        if torch.compiler.is_compiling():
            return check()

        def of_this_rank() -> Any:
            _refuse_dtensors(tensors)
            return check()

        tokens = tensors[1].shape[2] if _has_dimensions(tensors[1], 4) else 0
        facts = agreement.facts_of(tensors, constants)
        facts |= {name: value if isinstance(value, bool) else value is not None for name, value in others.items()}
        found, total = agreement.agreed(self.ranks, self._agreed, op, facts, of_this_rank, tokens)
        self._total = total if self._total is None else self._total
        return found

    def _transport(self, x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
        return transport(x, opt, share_of(x, opt, self._offset(), self.ranks), x.key.shape[0])

    def _counters(self, x: Operands, opt: Options) -> Tensor | None:
        """Where the weights of this rank's queries stand among the random numbers of all: [B, Hk, G·L, M]."""
        if opt.dropout_p == 0.0:
            return None
        assert x.query is not None
        b, h, length, _ = x.query.shape
        rows, total = self.places.rows(length, x.query.device, self.ranks)
        return counters(rows, total, (b, x.key.shape[1], h // x.key.shape[1]), x.references.shape[1])
