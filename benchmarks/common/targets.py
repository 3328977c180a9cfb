"""What a target of a table is, how rows are found for it, and from which length on one line lies below another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.common.results import OK, Row

MET, NOT_MET, UNMEASURED = "met", "**not met**", "not measured"
FMA_PEAK = "fma peak"


class Measured(NamedTuple):
    """A judged value: the number, how it is printed, and what it says beside it."""

    value: float
    text: str


@dataclass(frozen=True)
class Target:
    """One line of the table; `least` targets are met from above, the others from below."""

    where: str
    what: str
    bound: float
    unit: str
    least: bool
    measure: Callable[[Sequence[Row]], Measured | None]

    def verdict(self, measured: Measured | None) -> str:
        """met, not met, or not measured."""
        if measured is None or math.isnan(measured.value):
            return UNMEASURED
        met = measured.value >= self.bound if self.least else measured.value <= self.bound
        return MET if met else NOT_MET

    def line(self, rows: Sequence[Row]) -> str:
        """The markdown line."""
        measured = self.measure(rows)
        sign = "≥" if self.least else "≤"
        text = "–" if measured is None else measured.text
        return f"| {self.where} | {self.what} | {sign} {self.bound:g}{self.unit} | {text} | {self.verdict(measured)} |"


def find(rows: Sequence[Row], **columns: object) -> list[Row]:
    """The measured rows with these cells."""
    return [row for row in rows if row.status == OK and all(getattr(row, k) == v for k, v in columns.items())]


def break_even(lengths: Sequence[int], ratios: Sequence[float]) -> float:
    """The length from which the ratio stays at 1 or above, log-log interpolated; inf if it never does.

    Below the first measured length nothing is known, so a method that already wins there gets that length.
    """
    losing = [i for i, ratio in enumerate(ratios) if ratio < 1]
    if not losing:
        return float(lengths[0])
    last = losing[-1]
    if last + 1 == len(lengths):
        return math.inf
    low, high = math.log(ratios[last]), math.log(ratios[last + 1])
    share = -low / (high - low)
    return math.exp(math.log(lengths[last]) + share * (math.log(lengths[last + 1]) - math.log(lengths[last])))
