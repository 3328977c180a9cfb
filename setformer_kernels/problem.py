"""What one call is: its tensors (`Operands`), its constants (`Options`), its static facts (`Problem`).

Letters as in the definition: `B` batch, `H` heads, `L` queries, `S` keys, `M` references, `D` head dim, `E` value head
dim, `R` landmarks, `P` position coordinates, `T` = `num_iters`.  Every op, backend and gradient uses the field order
of `Operands`; it stands here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("rbf", "dot")
Fields = TypeVar("Fields", bound=NamedTuple)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Operands(NamedTuple):
    """The tensors of one call, already normalised: floats of one dtype for q, k, v; the rest in the compute dtype.

    `None` stands for: no query (pooling), all keys take part, uniform references, the scalar of `Options`, no
    positions, no dropout.  Broadcasts are expanded views (stride 0), so shapes are always the full ones.
    """

    query: Tensor | None  # [B, H, L, D]
    key: Tensor  # [B, H, S, D]
    value: Tensor  # [B, H, S, E]
    references: Tensor  # [H, M, D]
    log_a: Tensor | None  # [B, H, S] log mass of the keys, -inf where a key is absent
    log_b: Tensor | None  # [H, M] log mass of the references
    bandwidth: Tensor | None  # [H] β
    epsilon: Tensor | None  # [H] ε
    key_relaxation: Tensor | None  # [H] λ_a
    reference_relaxation: Tensor | None  # [H] λ_b
    position_scale: Tensor | None  # [H] τ
    query_position: Tensor | None  # [B, H, L, P]
    key_position: Tensor | None  # [B, H, S, P]
    reference_position: Tensor | None  # [H, M, P]
    seed: Tensor | None  # [] int64, the Philox key of dropout


HYPER = ("bandwidth", "epsilon", "key_relaxation", "reference_relaxation", "position_scale")
SCALARS = (1.0, 0.05, 1.0, 1.0, 1.0)  # what they are unless given


class Options(NamedTuple):
    """The constants of one call; `scalars` holds the five hyperparameters of `HYPER` for those that are no tensor."""

    scalars: tuple[float, ...]
    kernel: str
    num_iters: int  # its default is the public functions' affair, and not the same for all of them
    dropout_p: float = 0.0
    backend: str = "auto"


class Passed(Options):
    """`Options` kept for calls that look alike: what was found out for one of them is known of the others."""

    def __init__(self, *_: Any) -> None:
        self.found: dict[Any, Any] = {}


class Stream(NamedTuple):
    """What a causal scan takes beside `Operands`; `None` stands for: keys that lose nothing, no key seen before."""

    log_decay: Tensor | None = None  # [B, H, S] ≤ 0, what earlier keys lose at each key; 0 where that takes no part
    initial_state: Tensor | None = None  # [B, H, M, 2E + 3], as reference/state.py lays it out


NO_STREAM = Stream()


def is_plain(stream: Stream, with_state: bool) -> bool:
    """Whether a scan has no state, before or after, and no gates: then a factor of all masses changes nothing."""
    return not with_state and all(t is None for t in stream)


class Sinkhorn(NamedTuple):
    """One call of log-domain Sinkhorn on G problems; `None` stands for uniform masses, or for a number of `scalars`."""

    log_kernel: Tensor  # [G, N, M]
    log_a: Tensor | None = None  # [G, N]
    log_b: Tensor | None = None  # [G, M]
    lam_a: Tensor | None = None  # [G]
    lam_b: Tensor | None = None  # [G]
    scalars: Sequence[float] = (1.0, 1.0)  # λ_a and λ_b
    num_iters: int = 100
    tol: float | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What has a gradient."""
        return self[:5]


def replaced(x: Fields, **changes: Any) -> Fields:
    """`x._replace(**changes)`, in a form that torch.compile traces on every supported release."""
    kind = type(x)
    return kind(*[changes.get(name, getattr(x, name)) for name in kind._fields])


def with_an_absent_key(x: Operands) -> Operands:
    """No key at all is one key without mass: zeros out, and zero gradients for everything."""
    position = x.key_position
    return replaced(
        x,
        key=F.pad(x.key, (0, 0, 0, 1)),
        value=F.pad(x.value, (0, 0, 0, 1)),
        log_a=x.references.new_full((*x.key.shape[:2], 1), -math.inf),
        key_position=None if position is None else F.pad(position, (0, 0, 0, 1), value=math.nan),
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of potentials, sums and parameters: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """The static facts a backend needs to say whether it can run: nothing here depends on values.

    Lengths are 0 where a call is traced with unknown ones; inside the ops they are real integers.
    """

    # "attention", "pool", "causal", each also with "packed_" before it; "transport", "read", "masked", "features",
    # "sinkhorn"
    op: str
    device: str  # device type
    dtype: torch.dtype
    D: int = 0
    E: int = 0
    M: int = 0  # references, landmarks (features) or columns (sinkhorn)
    P: int = 0
    num_iters: int = 0
    kernel: str = "rbf"
    dropout: bool = False
    N: int = 0  # keys, or rows (sinkhorn)
    backward: bool = False  # the gradient of the op, from what its forward saves
    B: int = 0
    H: int = 0
    L: int = 0  # queries; 0 where there are none
    # "unrolled" (a tolerance, but for sinkhorn, or an info), "started" (the same from an initial potential) or
    # "implicit" (the gradient of the fixed point); "": T iterations
    converged: str = ""


def memory_order(t: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    strides = t.stride()
    return sorted(range(len(strides)), key=strides.__getitem__, reverse=True)  # equal ones stay in order


def beyond(p: Problem, dtypes: tuple[torch.dtype, ...], references: int, head_dim: int) -> list[str]:
    """What of `p` a backend of tiles in fast memory does not hold, in sentences that follow its name."""
    reasons = [] if p.dtype in dtypes else [f"has no kernels for {p.dtype}"]
    if p.op != "sinkhorn" and references < p.M:
        reasons.append(f"holds at most {references} references, not {p.M}")
    if max(p.D, p.E) > head_dim:
        reasons.append(f"holds head dims of at most {head_dim}, not {max(p.D, p.E)}")
    if p.converged == "started":
        reasons.append("has no kernels for initial_potential with grad='unrolled'")
    if p.op in ("causal", "packed_causal") and p.num_iters > 1:
        reasons.append("the causal scan needs num_iters <= 1")
    return reasons


def unconverging(p: Problem) -> str:
    """What of a `p` that is to converge a backend of plain iterations does not have."""
    tolerance = "" if p.op == "sinkhorn" else "tol, "  # sinkhorn's kernels stop by one
    return f"has no kernels for {tolerance}grad='implicit', method='newton' or initial_potential"


def empty_in_order(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """An empty dense tensor of `shape` whose dimensions lie in memory in the order of those of `like`."""
    return torch.empty_permuted(tuple(shape), memory_order(like), dtype=like.dtype, device=like.device)


def empty_factors(x: Operands, by_token: bool) -> tuple[Tensor, Tensor]:
    """Empty W^q [B, H, L, M] and W^k [B, H, S, M] in the compute dtype; in memory [B, N, H, M] if `by_token`."""
    assert x.query is not None
    layout, dtype = (0, 2, 1, 3) if by_token else (0, 1, 2, 3), compute_dtype(x.key.dtype)
    shapes = [(*t.shape[:-1], x.references.shape[1]) for t in (x.query, x.key)]
    w_q, w_k = (torch.empty_permuted(s, layout, dtype=dtype, device=x.key.device) for s in shapes)
    return w_q, w_k


def in_order(like: Tensor | None, t: Tensor | None) -> Tensor | None:
    """`t`, dense, in the memory order of `like`; None where either is."""
    if t is None or like is None:
        return None
    if like.is_contiguous():
        return t.contiguous()
    result = empty_in_order(like, t.shape)
    return t if t.stride() == result.stride() else result.copy_(t)
