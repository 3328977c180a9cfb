"""The case list: every shape, option and extreme a backend is held to, by name.

A `Case` is data; `make` turns it into the tensors and keywords of `functional.set_attention`, in float64 and seeded by
the case's name, so that every backend and precision sees the same numbers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of set_attention: sizes, options, and how its inputs are drawn."""

    name: str
    B: int = 2
    H: int = 3
    L: int = 65
    S: int = 100
    M: int = 7
    D: int = 16
    E: int = 16
    P: int = 0
    attn: str = (
        ""  # a mask of every query: "bool", "float", "window", "alibi", "swin", "banned" (most rows see nothing)
    )
    mask: str = ""  # "", "bool", "float", "one" (one key left), "none" (batch element 0 sees no key)
    layout: str = "bhnd"  # memory order of q, k, v; "expanded": one key for all heads
    scale: float = 1.0  # of q and k
    position_spread: float = 1.0
    positionless: int = 0  # leading keys without a position
    log_mass: bool = False
    tensors: bool = False  # hyperparameters as tensors [H]
    zeros: bool = False  # some query and key rows are zero
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("plain"),
    Case("t0", options={"num_iters": 0}),
    Case("t1", options={"num_iters": 1}),
    Case("t10", options={"num_iters": 10}),
    Case("length_1", B=8, H=8, L=1, S=1),  # its gradients of q, k are 0 but for rounding: many heads average it
    Case("length_63", L=63, S=63, M=64, D=64, E=64),
    Case("length_1000", B=1, H=2, L=1000, S=1000, M=64, D=64, E=32),
    Case("one_reference", M=1),
    Case("many_references", B=1, H=2, M=200, D=32, E=48),
    Case("wide", B=1, H=2, D=256, E=128, M=64),
    Case("medium", B=1, H=2, L=70, S=130, M=128, D=128, E=128),
    Case("odd_sizes", D=19, E=33, M=13, L=31, S=47),
    Case("bnhd", layout="bnhd", D=32, E=32),
    Case("bhdn", layout="bhdn", D=17, E=33),
    Case("expanded", layout="expanded"),
    Case("bool_mask", mask="bool"),
    Case("float_mask", mask="float"),
    Case("one_key", mask="one"),
    Case("no_key", mask="none"),
    Case("log_mass", log_mass=True),
    Case("tensors", tensors=True, log_mass=True, mask="float", P=2),
    Case("positions", P=2),
    Case("positionless", P=3, positionless=2, mask="bool"),
    Case("far_positions", P=2, position_spread=30.0),
    Case("unbalanced", options={"key_relaxation": 0.5, "reference_relaxation": 0.7}),
    Case("no_relaxation", options={"key_relaxation": 0.0, "reference_relaxation": 0.0}),
    Case("dot", scale=0.2, options={"kernel": "dot"}),
    Case("dot_wide_range", scale=5.0, options={"kernel": "dot", "epsilon": 0.5}),
    Case("small_epsilon", options={"epsilon": 0.005}),
    Case("small_epsilon_wide", options={"epsilon": 0.005, "bandwidth": 3.0, "num_iters": 5}),
    Case("large_scale", scale=1e4),
    Case("huge_scale", scale=1e15),
    Case("tiny_scale", scale=1e-20),
    Case("zero_rows", zeros=True),
    Case("dropout", options={"dropout_p": 0.3}),
    Case("causal_t0", L=100, options={"causal": True, "num_iters": 0}),
    Case("causal_t1", L=100, options={"causal": True, "num_iters": 1}),
    Case("causal_long", B=1, H=2, L=1000, S=1000, M=64, D=64, E=48, options={"causal": True, "num_iters": 1}),
    Case("causal_bhdn", L=100, layout="bhdn", options={"causal": True, "num_iters": 1}),
    Case("causal_mask", L=100, mask="bool", options={"causal": True, "num_iters": 1}),
    Case(
        "causal_float_mask", L=100, mask="float", options={"causal": True, "num_iters": 1, "reference_relaxation": 0.5}
    ),
    Case("causal_no_key", L=100, mask="none", options={"causal": True, "num_iters": 1}),
    Case("causal_tensors", L=100, tensors=True, log_mass=True, P=2, options={"causal": True, "num_iters": 1}),
    Case("causal_small_epsilon", L=100, options={"causal": True, "num_iters": 1, "epsilon": 0.005}),
    Case("causal_dropout", L=100, options={"causal": True, "num_iters": 1, "dropout_p": 0.3}),
)

# Queries with masses of their own: masks [L, S] or [B, H, L, S], and causal calls that no scan answers.
MASKED_CASES = (
    Case("masked_causal", L=100, options={"causal": True, "num_iters": 3}),
    Case("masked_causal_long", B=1, H=2, L=700, S=700, M=64, D=64, E=48, options={"causal": True, "num_iters": 2}),
    Case("masked_causal_few_queries", L=37, mask="float", options={"causal": True, "num_iters": 3}),
    Case("masked_causal_few_keys", L=100, S=61, options={"causal": True, "num_iters": 1}),
    Case("masked_causal_bias", L=100, attn="alibi", options={"causal": True, "num_iters": 3}),
    Case("masked_bool", attn="bool", options={"num_iters": 3}),
    Case("masked_float", attn="float", mask="float", options={"num_iters": 3}),
    Case("masked_t0", attn="float", options={"num_iters": 0}),
    Case("masked_t1", attn="float", options={"num_iters": 1}),
    Case("masked_t10", attn="float", options={"num_iters": 10}),
    Case("masked_window", B=1, L=300, S=300, M=16, attn="window", options={"num_iters": 3}),
    Case("masked_alibi", L=150, S=150, attn="alibi", options={"num_iters": 2}),
    Case("masked_swin", B=4, L=49, S=49, M=16, D=32, E=32, attn="swin", options={"num_iters": 1}),
    Case("masked_banned", attn="banned", options={"num_iters": 3}),
    Case("masked_many_references", B=1, H=2, M=300, D=32, E=48, attn="bool", options={"num_iters": 2}),
    Case("masked_odd_sizes", D=19, E=33, M=13, L=31, S=47, attn="float", options={"num_iters": 3}),
    Case("masked_bhdn", layout="bhdn", D=17, E=33, attn="bool", options={"num_iters": 2}),
    Case("masked_expanded", layout="expanded", attn="bool", options={"num_iters": 2}),
    Case("masked_tensors", tensors=True, log_mass=True, mask="float", P=2, attn="float", options={"num_iters": 3}),
    Case("masked_positions", P=2, attn="window", options={"num_iters": 3}),
    Case("masked_positionless", P=3, positionless=2, mask="bool", attn="bool", options={"num_iters": 2}),
    Case("masked_far_positions", P=2, position_spread=30.0, attn="bool", options={"num_iters": 2}),
    Case(
        "masked_unbalanced", attn="float",
        options={"num_iters": 3, "key_relaxation": 0.5, "reference_relaxation": 0.7},
    ),
    Case(
        "masked_no_relaxation", attn="bool",
        options={"num_iters": 2, "key_relaxation": 0.0, "reference_relaxation": 0.0},
    ),
    Case("masked_dot", scale=0.2, attn="float", options={"num_iters": 2, "kernel": "dot"}),
    Case("masked_dot_wide_range", scale=5.0, attn="bool", options={"num_iters": 2, "kernel": "dot", "epsilon": 0.5}),
    Case("masked_small_epsilon", attn="float", options={"num_iters": 3, "epsilon": 0.005}),
    Case("masked_causal_small_epsilon", L=100, options={"causal": True, "num_iters": 2, "epsilon": 0.005}),
    Case("masked_middle_epsilon", L=100, options={"causal": True, "num_iters": 3, "epsilon": 0.015}),
    Case("masked_large_scale", scale=1e4, attn="bool", options={"num_iters": 2}),
    Case("masked_zero_rows", zeros=True, attn="bool", options={"num_iters": 2}),
    Case("masked_dropout", attn="float", options={"num_iters": 3, "dropout_p": 0.3}),
)  # fmt: skip

ALL_CASES = {case.name: case for case in (*CASES, *MASKED_CASES)}


def make(case: Case, draw: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(query, key, value, references) and the other keywords, in float64, on the CPU whatever the default device is."""
    with torch.device("cpu"):
        return _make(case, torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + draw))


def _make(case: Case, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tokens = {
        "query": _laid_out(case, case.scale * normal(case.B, case.H, case.L, case.D)),
        "key": _laid_out(case, case.scale * normal(case.B, case.H, case.S, case.D), shared=True),
        "value": _laid_out(case, normal(case.B, case.H, case.S, case.E)),
        "references": normal(case.H, case.M, case.D),
    }
    if case.zeros:
        tokens["query"][:, :, ::3] = 0
        tokens["key"][:, :, ::4] = 0
    keywords = {"num_iters": 3, **case.options}
    if case.mask:
        keywords["key_mask"] = _mask(case, g)
    if case.attn:
        keywords["attn_mask"] = _query_mask(case, g)
    if case.log_mass:
        keywords["reference_log_mass"] = normal(case.H, case.M)
    if case.P:
        keywords |= _positions(case, normal)
    if case.tensors:
        keywords |= _hyper(case.H, normal)
    if keywords.get("dropout_p"):
        keywords["seed"] = torch.tensor(1234567890123)
    return tokens, keywords


def _hyper(heads: int, normal: Any) -> dict[str, Tensor]:
    """A value for each head, [H]."""
    return {
        "bandwidth": 1 + 0.2 * normal(heads),
        "epsilon": 0.1 + 0.02 * normal(heads),
        "key_relaxation": torch.sigmoid(normal(heads)),
        "reference_relaxation": torch.sigmoid(normal(heads)),
    }


def _laid_out(case: Case, t: Tensor, shared: bool = False) -> Tensor:
    """[B, H, N, D] in the case's memory order."""
    if case.layout == "bnhd":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if case.layout == "bhdn":
        return t.mT.contiguous().mT
    if case.layout == "expanded" and shared:
        return t[:, :1].expand(t.shape)
    return t


def _mask(case: Case, g: torch.Generator) -> Tensor:
    """[B, S]; the keys it bans hold NaN in the tests that poison them."""
    if case.mask == "float":
        mask = 2 * torch.randn(case.B, case.S, generator=g, dtype=torch.float64)
        mask[:, 1::5] = -torch.inf
        return mask
    keep = torch.rand(case.B, case.S, generator=g) < 0.6
    if case.mask == "one":
        keep = torch.zeros(case.B, case.S, dtype=torch.bool)
        keep[:, case.S // 2] = True
    keep[:, case.S // 2] = True
    if case.mask == "none":
        keep[0] = False
    return keep


def _query_mask(case: Case, g: torch.Generator) -> Tensor:
    """[L, S], or [B, H, L, S] with broadcast dimensions expanded."""
    ahead = torch.arange(case.S) - torch.arange(case.L).unsqueeze(1)  # how far the key stands after the query
    if case.attn == "window":
        return ahead.abs() < 8
    heads = torch.arange(1, case.H + 1, dtype=torch.float64)[:, None, None]
    if case.attn == "alibi":
        return (-ahead.abs() * 2**-heads).expand(case.B, -1, -1, -1)
    if case.attn == "swin":
        bias = torch.randn(case.H, case.L, case.S, generator=g, dtype=torch.float64)
        region = torch.randint(2, (case.B, case.S), generator=g)
        apart = region.unsqueeze(-1) != region[:, torch.arange(case.L) % case.S].unsqueeze(-2)
        return bias - 100.0 * apart.mT.unsqueeze(1)
    keep = torch.rand(case.L, case.S, generator=g) < 0.6
    keep[2::7] = False
    if case.attn == "banned":
        keep[: 4 * case.L // 5] = False
    if case.attn != "float":
        return keep
    mask = 2 * torch.randn(case.B, case.H, case.L, case.S, generator=g, dtype=torch.float64)
    return mask.masked_fill(~keep, -torch.inf)


def _positions(case: Case, normal: Any) -> dict[str, Tensor]:
    key = case.position_spread * normal(case.B, case.S, case.P)
    key[:, : case.positionless] = torch.nan
    return {
        "query_position": case.position_spread * normal(case.L, case.P),
        "key_position": key,
        "reference_position": case.position_spread * normal(case.H, case.M, case.P),
        "position_scale": 0.5 + 0.1 * normal(case.H).abs(),
    }
