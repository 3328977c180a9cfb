"""Which layers to convert: each one's cost alone, and the error of the cheapest one, two, ... of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .measuring import output_agreement
from .students import hybrid_of


class Converted(NamedTuple):
    """A step of the curve: one more layer, its cost alone, and the output's relative error with it and those before."""

    layer: str
    alone: float
    error: float


def conversion_curve(
    teacher: nn.Module, student: nn.Module, layers: Sequence[str], batches: Sequence[dict[str, Tensor]], *,
    pooling: str = "mean", progress: Callable[[str], None] = lambda line: None, **own: Any,
) -> list[Converted]:  # fmt: skip
    """Layers in the order of the error that the output gets from one alone, with the error of all up to each.

    Args:
        student: a converted copy of the teacher, made with the arguments own, its layers matched.
        batches: walked twice for every layer.
        progress: called with a line for every measurement.
    """

    def error(names: Sequence[str]) -> float:
        return output_agreement(teacher, hybrid_of(teacher, student, names, **own), batches, pooling)["error"]

    alone = {}
    for name in layers:
        alone[name] = error([name])
        progress(f"{name} alone: error {alone[name]:.4f}")
    order = sorted(layers, key=lambda name: alone[name])
    curve = []
    for count, name in enumerate(order, 1):
        curve.append(Converted(name, alone[name], alone[name] if count == 1 else error(order[:count])))
        progress(f"{count} of {len(order)} layers, with {name}: error {curve[-1].error:.4f}")
    return curve


def within(curve: Sequence[Converted], max_error: float) -> list[str]:
    """The layers before the first step whose error is above max_error."""
    chosen = []
    for step in curve:
        if step.error > max_error:
            break
        chosen.append(step.layer)
    return chosen
