"""Timing: interleaved rounds, medians with quartiles, paired ratios.

One round runs every implementation once (A B C A B C ...), so that whatever disturbs the machine disturbs all of them
alike, and a ratio is taken inside each round before its median is.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[Callable[[], object], int], float]

MIN_SAMPLE_S = 2e-3  # shorter calls are repeated inside one sample, so that the timer's own cost vanishes
WARM_BELOW_S = 0.1  # calls shorter than this get an untimed call first, so that no neighbour's cache traffic is billed
MIN_ROUNDS, MAX_ROUNDS = 3, 40


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    q25: float
    median: float
    q75: float


def quartiles(samples: Sequence[float]) -> Quartiles:
    """Quartiles with linear interpolation between order statistics; one sample is its own spread."""
    if len(samples) == 1:
        return Quartiles(samples[0], samples[0], samples[0])
    q25, _, q75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Quartiles(q25, statistics.median(samples), q75)


def paired_ratio(samples: Sequence[float], baseline: Sequence[float]) -> Quartiles:
    """Quartiles of samples[r]/baseline[r] over the rounds r: above 1, the baseline is the faster one."""
    return quartiles([sample / base for sample, base in zip(samples, baseline, strict=True)])


def wall_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call over `repeats` calls; right where a call returns only when its work is done (CPU)."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


# A device whose calls return early needs a clock of its own (events on its stream); `--device` offers what is here.
CLOCKS: dict[str, Clock] = {"cpu": wall_clock}


def _estimate(call: Callable[[], object], clock: Clock) -> float:
    """Seconds one call takes once warm."""
    first = clock(call, 1)
    return first if first > 1.0 else min(clock(call, 1) for _ in range(2))


def repeats_for(seconds: float) -> int:
    """Calls inside one sample, so that the sample lasts at least MIN_SAMPLE_S."""
    return max(1, math.ceil(MIN_SAMPLE_S / max(seconds, 1e-9)))


def rounds_for(seconds: Sequence[float], budget_s: float) -> int:
    """Rounds that fit the budget, each sample counted with its untimed call, within [MIN_ROUNDS, MAX_ROUNDS]."""
    one_round = sum(s * (repeats_for(s) + (s < WARM_BELOW_S)) for s in seconds)
    return min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget_s / max(one_round, 1e-9))))


def interleave(
    calls: Mapping[Key, Callable[[], object]], budget_s: float, clock: Clock = wall_clock
) -> dict[Key, list[float]]:
    """Samples of every call in seconds, one per round, in rounds that together take about `budget_s`."""
    estimates = {key: _estimate(call, clock) for key, call in calls.items()}
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds_for(list(estimates.values()), budget_s)):
            for key, call in calls.items():
                if estimates[key] < WARM_BELOW_S:
                    call()
                samples[key].append(clock(call, repeats_for(estimates[key])))
    finally:
        gc.enable()
    return samples
