"""Which layers to convert: each one's cost alone, and the error of the cheapest one, two, ... of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .matching import chosen, output_of, tokens_of
from .students import hybrid_of


class Converted(NamedTuple):
    """A step of the curve: one more layer, its cost alone, and the output's relative error with it and those before."""

    layer: str
    alone: float
    error: float


def conversion_curve(
    teacher: nn.Module, student: nn.Module, layers: Sequence[str], batches: Sequence[dict[str, Tensor]], *,
    progress: Callable[[str], None] = lambda line: None, **own: Any,
) -> list[Converted]:  # fmt: skip
    """Layers in the order of the error that the output gets from one alone, with the error of all up to each.

    Args:
        student: a converted copy of the teacher, made with the arguments own, its layers matched.
        batches: walked twice for every layer, and once by the teacher, whose outputs are kept.
        progress: called with a line for every measurement.
    """
    with torch.no_grad():
        wanted = [output_of(teacher(**batch))[1] for batch in batches]
    alone = {}
    for name in layers:
        alone[name] = _error(hybrid_of(teacher, student, [name], **own), batches, wanted)
        progress(f"{name} alone: error {alone[name]:.4f}")
    order = sorted(layers, key=lambda name: alone[name])
    curve = [Converted(order[0], alone[order[0]], alone[order[0]])]
    for count, name in enumerate(order[1:], 2):
        error = _error(hybrid_of(teacher, student, order[:count], **own), batches, wanted)
        curve.append(Converted(name, alone[name], error))
        progress(f"{count} of {len(order)} layers, with {name}: error {error:.4f}")
    return curve


@torch.no_grad()
def _error(model: nn.Module, batches: Sequence[dict[str, Tensor]], wanted: Sequence[Tensor]) -> float:
    """‖y − y*‖/‖y*‖ over all tokens of all batches."""
    wrong = of = 0.0
    for batch, target in zip(batches, wanted, strict=True):
        tokens = tokens_of(batch, target)
        a, b = (chosen(x, tokens).double() for x in (target, output_of(model(**batch))[1]))
        wrong, of = wrong + float((a - b).square().sum()), of + float(a.square().sum())
    return float((wrong / max(of, 1e-20)) ** 0.5)


def within(curve: Sequence[Converted], max_error: float) -> list[str]:
    """The layers before the first step whose error is above max_error."""
    chosen = []
    for step in curve:
        if step.error > max_error:
            break
        chosen.append(step.layer)
    return chosen
