"""How far a student is from its teacher: head by head on the teacher's inputs, and in what the models return."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import recorded, taught
from .matching import check_same_layers, chosen, output_of, pool, tokens_of, wide
from .students import references_of


class HeadError(NamedTuple):
    """‖o − o*‖/‖o*‖ of one head, over all tokens that take part."""

    layer: str
    head: int
    error: float


@torch.no_grad()
def attention_errors(
    teacher: nn.Module, student: nn.Module, layers: Sequence[str], batches: Iterable[dict[str, Tensor]]
) -> list[HeadError]:
    """The error of every head of every layer on the teacher's own inputs, before an output projection.

    Args:
        layers: names of modules that both models have; the student's are SeT attention.
        batches: keyword arguments of both models.
    """
    check_same_layers(teacher, layers)
    heads = {name: len(references_of(student.get_submodule(name)).references) for name in layers}
    sums = {name: torch.zeros(2, count, dtype=torch.float64) for name, count in heads.items()}
    for batch in batches:
        with recorded(teacher, layers, heads=True) as (said, wanted):
            teacher(**batch)
        with taught(student, layers, said, heads=True) as (_, got):
            student(**batch)
        for name in layers:
            for x, target in zip(got[name], wanted[name], strict=True):
                sums[name] += _squares(x, target, heads[name], tokens_of(batch, target))
    return [
        HeadError(name, head, float((wrong / of.clamp_min(1e-20)).sqrt()))
        for name, both in sums.items()
        for head, (wrong, of) in enumerate(both.T)
    ]


def _squares(x: Tensor, target: Tensor, heads: int, tokens: Tensor | None) -> Tensor:
    """Σ‖x − target‖² and Σ‖target‖² by head, [2, H], of x and target [..., H·D]."""
    x, target = (chosen(each, tokens).unflatten(-1, (heads, -1)).flatten(0, -3).double() for each in (x, target))
    return torch.stack([(x - target).square().sum((0, 2)), target.square().sum((0, 2))]).cpu()


@torch.no_grad()
def output_agreement(
    teacher: nn.Module, student: nn.Module, batches: Iterable[dict[str, Tensor]], pooling: str = "mean"
) -> dict[str, float]:
    """What the student returns against what the teacher returns.

    error: ‖y − y*‖/‖y*‖ over all tokens; cosine: mean over the samples, of logits or hidden states pooled over a
    sample's tokens; correlation: Pearson's, of the cosines of all pairs of samples; nearest: the share of samples whose
    nearest neighbour is the same; of logits also top1: the share of rows with the same largest one.
    """
    vectors: list[tuple[Tensor, Tensor]] = []
    wrong = of = same = rows = 0.0
    kind = ""
    for batch in batches:
        (kind, target), (_, x) = output_of(teacher(**batch)), output_of(student(**batch))
        tokens = tokens_of(batch, target)
        a, b = chosen(target, tokens).double(), chosen(x, tokens).double()
        wrong, of = wrong + float((a - b).square().sum()), of + float(a.square().sum())
        same, rows = same + float((a.argmax(-1) == b.argmax(-1)).sum()), rows + a.shape[:-1].numel()
        vectors.append((_vector(target, tokens, pooling), _vector(x, tokens, pooling)))
    if not vectors:
        raise ValueError("batches must hold at least one batch, got none")
    measured = {"error": (wrong / max(of, 1e-20)) ** 0.5}
    if kind == "logits":
        measured["top1"] = same / rows
    return measured | _neighbourhoods(*(torch.cat(each) for each in zip(*vectors, strict=True)))


def _vector(x: Tensor, tokens: Tensor | None, pooling: str) -> Tensor:
    """A unit vector a sample, [B, ...]."""
    return F.normalize(pool(wide(x), tokens, pooling).flatten(1), dim=-1).cpu()


def _neighbourhoods(target: Tensor, x: Tensor) -> dict[str, float]:
    """Of unit vectors [N, E] each."""
    measured: dict[str, Any] = {"cosine": float((target * x).sum(-1).mean())}
    if len(x) > 2:
        upper = tuple(torch.triu_indices(len(x), len(x), 1))
        similar = target @ target.T, x @ x.T
        pairs = torch.stack([each[upper] for each in similar])
        measured["correlation"] = float(torch.corrcoef(pairs)[0, 1])
        first, second = (each.fill_diagonal_(-torch.inf).argmax(1) for each in similar)
        measured["nearest"] = float((first == second).double().mean())
    return measured
