"""Spherical k-means, one problem per head: the unsupervised initialisation of OTKE (Mialon et al., ICLR 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks

INITS = ("k-means++", "random")


class TooFewTokensError(ValueError):
    """Fewer tokens than centres."""


def spherical_kmeans(
    x: Tensor, num_clusters: int, *, num_iters: int = 20, init: str = "k-means++",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Unit centres [H, K, D] and labels [H, n] of x [H, n, D], maximising Σ_i ⟨x̂_i, centre of i⟩ per head.

    A cluster that loses all its tokens restarts at one of the tokens served worst.  Costs O(num_iters·H·n·K·D) time and
    O(H·n·K) memory.

    Raises:
        TooFewTokensError: fewer tokens (zero ones not counted) than clusters.
        ValueError: an unknown init.
    """
    init, num_iters = checks.choice("init", init, INITS), checks.iterations(num_iters)
    x = F.normalize(x, dim=-1)
    alive = x.norm(dim=-1) > 0.5  # [H, n]: zero tokens have no direction, and are never a centre
    fewest = min([*alive.sum(1).tolist(), x.shape[1]])
    if fewest < num_clusters:
        raise TooFewTokensError(f"{num_clusters} clusters need at least as many tokens that are not zero, got {fewest}")
    seeds = _seeds_plus_plus if init == "k-means++" else _seeds_random
    centres = _rows(x, seeds(x, alive, num_clusters, generator))
    labels = (x @ centres.mT).argmax(-1)
    for _ in range(num_iters):
        centres = _update(x, alive, centres, labels)
        labels = (x @ centres.mT).argmax(-1)
    return centres, labels


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [H, n, D], index [H, K] -> [H, K, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _seeds_random(x: Tensor, alive: Tensor, num_clusters: int, generator: torch.Generator | None) -> Tensor:
    """Indices [H, K] of distinct tokens, drawn uniformly."""
    return torch.multinomial(alive.to(x.dtype), num_clusters, generator=generator)


def _seeds_plus_plus(x: Tensor, alive: Tensor, num_clusters: int, generator: torch.Generator | None) -> Tensor:
    """Indices [H, K]: each next one drawn with probability ∝ 1 − max_j⟨x̂, seed_j⟩, half the squared distance."""
    index = [_seeds_random(x, alive, 1, generator)]
    gap = x.new_full(x.shape[:2], torch.inf)
    while len(index) < num_clusters:
        similarity = (x @ _rows(x, index[-1]).mT).squeeze(-1)  # [H, n]
        # the floor keeps a draw possible when every token coincides with a seed
        gap = torch.minimum(gap, 1.0 - similarity).clamp_min(1e-12)
        index.append(torch.multinomial(gap * alive, 1, generator=generator))
    return torch.cat(index, dim=1)


def _update(x: Tensor, alive: Tensor, centres: Tensor, labels: Tensor) -> Tensor:
    """One Lloyd step: mean directions [H, K, D]; sums by matmul, which is deterministic on every device."""
    member = F.one_hot(labels, centres.shape[1]).to(x.dtype)  # [H, n, K]
    empty = member.sum(1) == 0  # [H, K]
    fit = (x * _rows(centres, labels)).sum(-1).masked_fill(~alive, torch.inf)  # [H, n]
    worst = fit.topk(centres.shape[1], largest=False).indices  # [H, K]
    spare = _rows(x, worst.gather(1, (empty.cumsum(1) - 1).clamp_min(0)))
    return torch.where(empty[..., None], spare, F.normalize(member.mT @ x, dim=-1))


def cluster_means(x: Tensor, labels: Tensor, fallback: Tensor) -> Tensor:
    """Mean [H, K, P] of the rows of x [n, P] in each cluster of labels [H, n]; fallback [H, K, P] where there is none.

    Rows that hold a NaN (tokens without a position) do not count.
    """
    known = ~x.isnan().any(-1)  # [n]
    member = F.one_hot(labels[:, known], fallback.shape[1]).to(x.dtype).mT  # [H, K, n]
    count = member.sum(-1, keepdim=True)
    return torch.where(count > 0, (member @ x[known]) / count.clamp_min(1), fallback.to(x.dtype))
