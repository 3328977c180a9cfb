"""The targets of the design and what a results file says about them, as markdown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.common.cases import BOTH, FORWARD, MASKS, MODES
from benchmarks.common.results import OK, Row
from benchmarks.common.targets import FMA_PEAK, Measured, Target, break_even, find

HEADLINE_LENGTH = 4096  # the length the design's rows are about; other lengths judge nothing
MEMORY_MIN_LENGTH, MEMORY_MIN_HEADS = 4096, 8


def _headline(rows: Sequence[Row], mode: str, impl: str, T: int | None) -> list[Row]:
    return find(rows, case="headline", L=HEADLINE_LENGTH, mode=mode, impl=impl, T=T)


def _headline_ratio(mode: str, impl: str, T: int | None) -> Callable[[Sequence[Row]], Measured | None]:
    def measure(rows: Sequence[Row]) -> Measured | None:
        found = _headline(rows, mode, impl, T)
        if not found:
            return None
        row = found[0]
        text = f"{row.ratio:.3g}× ({row.ratio_q25:.3g}–{row.ratio_q75:.3g})"
        at_t1 = _headline(rows, mode, impl, None if T is None else 1)
        if at_t1 and not math.isnan(at_t1[0].ratio_t1):
            text += f"; T = 1: {at_t1[0].ratio_t1:.3g}×"
        return Measured(row.ratio, text)

    return measure


def peak_rate(rows: Sequence[Row]) -> float:
    """The FMA peak in FLOP/s, NaN if not measured: the best upper quartile of all its samples and of a plain matmul.

    A peak is a bound, so what disturbs a sample only lowers it; a median of disturbed samples would flatter the share.
    """
    found = [row.q75 for row in rows if row.status == OK and row.unit == "FLOP/s"]
    return max(found) if any(row.impl == FMA_PEAK and row.status == OK for row in rows) else math.nan


def peak_share(rows: Sequence[Row], T: int = 3) -> Measured | None:
    """Matmul FLOPs over (median time × FMA peak), both from the same run, in percent; above 100 it is no peak."""
    times, peak = _headline(rows, FORWARD, "set", T), peak_rate(rows)
    if not times or math.isnan(peak):
        return None
    share = 100 * times[0].work / times[0].median / peak
    text = f"{share:.3g} % of {peak / 1e9:.3g} GFLOP/s"
    return Measured(share, text) if share <= 100 else Measured(math.nan, f"{text}: the probe is wrong")


def sdpa_break_even(rows: Sequence[Row], mode: str, *, t1: bool = False) -> Measured | None:
    """Break-even of SeT with SDPA over the sweep."""
    found = sorted(find(rows, case="sweep", mode=mode, impl="sdpa"), key=lambda row: row.L or 0)
    if not found:
        return None
    lengths = [row.L or 0 for row in found]
    value = break_even(lengths, [row.ratio_t1 if t1 else row.ratio for row in found])
    if math.isinf(value):
        return Measured(value, f"none up to L = {lengths[-1]}")
    wins_everywhere = value == lengths[0]
    return Measured(value, f"{'L ≤ ' if wins_everywhere else 'L ≈ '}{value:.0f}")


def memory_share(rows: Sequence[Row]) -> Measured | None:
    """The worst measured extra memory of SeT over the size of q, k, v, o (L ≥ 4096, B·H ≥ 8)."""
    found = [
        row
        for row in find(rows, case="memory", impl="set")
        if (row.L or 0) >= MEMORY_MIN_LENGTH and (row.B or 0) * (row.H or 0) >= MEMORY_MIN_HEADS
    ]
    if not found:
        return None
    worst = max(row.median / row.work for row in found)
    return Measured(worst, "; ".join(f"{row.median / row.work:.3g}× (L = {row.L}, T = {row.T})" for row in found))


def _sinkhorn_ratio(impl: str) -> Callable[[Sequence[Row]], Measured | None]:
    def measure(rows: Sequence[Row]) -> Measured | None:
        found = find(rows, case="sinkhorn", mode=FORWARD, impl=impl)
        if not found:
            return None
        parts = [f"{row.ratio:.3g}× ({row.B}×{row.L}×{row.M}, {row.T} it.)" for row in found]
        return Measured(min(row.ratio for row in found), "; ".join(parts))

    return measure


CPU, ANY = "CPU", "any"
_AGAINST = {
    "sdpa": "`F.scaled_dot_product_attention`",
    "reference": "eager reference",
    "compiled": "compiled reference",
    "elu": "elu linear attention",
}
_RATIO_BOUNDS: Mapping[str, Mapping[str, float]] = {
    FORWARD: {"sdpa": 25, "reference": 4, "compiled": 2, "elu": 1},
    BOTH: {"sdpa": 25, "reference": 3.5, "compiled": 2},
}
_SOLVERS = {"pot": "POT (`ot.batch`)", "geomloss": "geomloss", "plain": "plain PyTorch"}


def _ratio_target(mode: str, impl: str, bound: float) -> Target:
    T = None if impl in ("sdpa", "elu") else 3
    what = f"{mode}, L = {HEADLINE_LENGTH}, against {_AGAINST[impl]}"
    return Target(CPU, what, bound, "×", True, _headline_ratio(mode, impl, T))


TARGETS = (
    *(_ratio_target(mode, impl, bound) for mode, bounds in _RATIO_BOUNDS.items() for impl, bound in bounds.items()),
    Target(CPU, "share of the FMA peak measured in the same run, forward", 40, " %", True, peak_share),
    Target(CPU, "break-even with SDPA, forward", 256, "", False, lambda rows: sdpa_break_even(rows, FORWARD)),
    Target(ANY, "peak extra memory, forward + backward, × (q, k, v, o)", 0.25, "×", False, memory_share),
    *(Target(ANY, f"`sinkhorn` against {name}", 10, "×", True, _sinkhorn_ratio(i)) for i, name in _SOLVERS.items()),
)


def _time(row: Row) -> str:
    scale, unit = (1e3, "ms") if row.median >= 1e-3 else (1e6, "µs")
    return f"{row.median * scale:.3g} {unit} ({row.q25 * scale:.3g}–{row.q75 * scale:.3g})"


def headline(rows: Sequence[Row]) -> str:
    """Every implementation at the headline length: medians with quartiles."""
    timed = [row for row in rows if row.case == "headline" and row.metric == "time"]
    L = timed[0].L if timed else HEADLINE_LENGTH
    lines = [f"| L = {L} | T | forward | forward + backward |", "|---|---|---|---|"]
    for impl, T in dict.fromkeys((row.impl, row.T) for row in timed):
        cells = []
        for mode in (FORWARD, BOTH):
            row = next((r for r in timed if (r.impl, r.T, r.mode) == (impl, T, mode)), None)
            cells.append("–" if row is None else _time(row) if row.status == OK else row.status)
        lines.append(f"| {impl} | {'–' if T is None else T} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def solvers(rows: Sequence[Row]) -> str:
    """Every sinkhorn solver, also those no target names: medians with quartiles, and their ratio to SeT's."""
    lines = ["| `sinkhorn` | problems | iterations | mode | time | against SeT |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row.case == "sinkhorn":
            time, ratio = (_time(row), f"{row.ratio:.3g}×") if row.status == OK else (row.status, "–")
            lines.append(f"| {row.impl} | {row.B} of {row.L}×{row.M} | {row.T} | {row.mode} | {time} | {ratio} |")
    return "\n".join(lines)


def masked(rows: Sequence[Row]) -> str:
    """SDPA's time over SeT's under the same mask, by length; empty where nothing was measured."""
    found = [row for row in rows if row.case in MASKS and row.impl == "sdpa" and row.status == OK]
    lengths = sorted({row.L or 0 for row in found})
    lines = [
        f"| mask | T | mode | {' | '.join(f'L = {L}' for L in lengths)} |",
        "|---|---|---" + "|---" * len(lengths) + "|",
    ]
    for mask, T, mode in itertools.product(MASKS, (1, 3), MODES):
        at = {row.L: row.ratio_t1 if T == 1 else row.ratio for row in found if (row.case, row.mode) == (mask, mode)}
        cells = ["–" if math.isnan(ratio) else f"{ratio:.3g}×" for ratio in (at.get(L, math.nan) for L in lengths)]
        lines.append(f"| {mask} | {T} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines) if found else ""


def floor(rows: Sequence[Row]) -> str:
    """What this machine could do at best for the headline forward, from its own measured limits."""
    times = _headline(rows, FORWARD, "set", 3)
    rates = {row.impl: row.median for row in find(rows, case="probe")}
    peak = peak_rate(rows)
    if not times or math.isnan(peak) or {"exp rate", "copy bandwidth"} - set(rates):
        return "Floor: not measured (the extension's probes are missing)."
    row = times[0]
    B, H, L, M, D = (row.B or 0), (row.H or 0), (row.L or 0), (row.M or 0), (row.D or 0)
    matmul, exps = row.work / peak, 4 * B * H * L * M / rates["exp rate"]
    moves = 4 * 4 * B * H * L * D / rates["copy bandwidth"]
    return (
        f"Floor of this machine, forward, L = {L}: {1e3 * matmul:.3g} ms of matmuls at {peak / 1e9:.3g} "
        f"GFLOP/s + {1e3 * exps:.3g} ms of exponentials at {rates['exp rate'] / 1e9:.3g} G/s "
        f"(moving q, k, v, o once: {1e3 * moves:.3g} ms at {rates['copy bandwidth'] / 1e9:.3g} GB/s); "
        f"reached: {1e3 * row.median:.3g} ms."
    )


def render(rows: Sequence[Row], stamp: Mapping[str, str]) -> str:
    """The whole table for a README."""
    head = ["| where | what | target | measured (T = 3; quartiles) | |", "|---|---|---|---|---|"]
    where = (
        f"{stamp['cpu']}, {stamp['threads']} threads, float32, B1 H8 D64 M64; torch {stamp['torch']}, "
        f"commit {stamp['commit']}, {stamp['date']}."
    )
    lines = [*head, *(target.line(rows) for target in TARGETS)]
    return "\n".join([*lines, "", where, "", floor(rows), "", headline(rows), "", masked(rows), "", solvers(rows)])
