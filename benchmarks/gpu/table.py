"""The design's GPU targets, what a results file says about them, and the plot of time against length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common.cases import BOTH, FORWARD
from benchmarks.common.results import OK, Row
from benchmarks.common.targets import Measured, Target, break_even, find
from benchmarks.compiled import model
from benchmarks.compiled.workloads import Call

SOFTMAX = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa default")
LONG = (16384, 65536)
COLOURS = {"triton": "#c1121f", "cuda": "#9d4edd", "sdpa": "#1d3557", "reference": "#588157", "compiled": "#bc6c25",
           "copy": "#8d99ae"}  # fmt: skip
Measure = Callable[[Sequence[Row]], Measured | None]


def beside(rows: Sequence[Row], backend: str) -> list[Row]:
    """What one process measured beside a backend, and other backends' own rows: no opponent from other rounds."""
    own = {row.impl for row in rows if row.impl == row.backend}
    return [row for row in rows if row.backend in ("", backend) or row.impl in own]


def timed(rows: Sequence[Row], **columns: object) -> Row | None:
    """The one measured time with these cells."""
    found = find(rows, metric="time", **columns)
    return found[0] if found else None


def softmax(rows: Sequence[Row], **columns: object) -> Row | None:
    """The fastest SDPA backend."""
    found = [row for impl in SOFTMAX if (row := timed(rows, impl=impl, **columns))]
    return min(found, key=lambda row: row.median) if found else None


def _worst(found: Sequence[tuple[float, str]], unit: str, least: bool = True) -> Measured | None:
    if not found:
        return None
    text = "; ".join(f"{value:.3g}{unit} ({what})" for value, what in found)
    return Measured((min if least else max)(value for value, _ in found), text)


def against_softmax(L: int) -> Measure:
    """Best SDPA over SeT at T = 3, forward."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        best = softmax(rows, case="headline", mode=FORWARD, L=L)
        if best is None or math.isnan(best.ratio):
            return None
        spread = f"{best.ratio_q25:.3g}–{best.ratio_q75:.3g}, {best.impl}"
        return Measured(best.ratio, f"{best.ratio:.3g}× ({spread}); T = 1: {best.ratio_t1:.3g}×")

    return measure


def rates(rows: Sequence[Row]) -> dict[str, float]:
    """The GPU's limits measured in the same run."""
    return {row.impl: row.median for row in find(rows, case="probe")}


def of_floor(backend: str, T: int) -> Measure:
    """Percent of max(bytes, exps, FLOPs), each at the rate measured in the same run; forward, worst length."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        rate, found = rates(rows), []
        if {"copy bandwidth", "exp rate", "matmul"} - set(rate):
            return None
        for L in LONG:
            row = timed(rows, case="headline", mode=FORWARD, L=L, impl=backend, T=T)
            if row is not None:
                call = Call("attention", L=L, T=T, B=row.B or 1, H=row.H or 1, D=row.D or 1, E=row.D or 1, M=row.M or 1)
                work = model.total("", model.stages(call))
                needs = work.bytes / rate["copy bandwidth"], work.exps / rate["exp rate"], work.flops / rate["matmul"]
                found.append((100 * max(needs) / row.median, f"L = {L}"))
        return _worst(found, " %")

    return measure


def of_copy(backend: str, mode: str, T: int) -> Measure:
    """Percent of the time in which q, k, v, o (and the gradients) are copied in the same rounds, worst length."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        found = []
        for L in LONG:
            row = timed(rows, case="headline", mode=mode, L=L, impl=backend, T=T)
            copy = timed(rows, case="headline", mode=mode, L=L, impl="copy")
            if row is not None and copy is not None:
                found.append((100 * copy.median / row.median, f"L = {L}"))
        return _worst(found, " %")

    return measure


def crossing(backend: str, mode: str) -> Measure:
    """Length from which the backend at T = 3 is faster than the best SDPA, B8 H16."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        lengths, ratios = [], []
        for L in sorted({row.L or 0 for row in find(rows, case="sweep", mode=mode)}):
            own = timed(rows, case="sweep", mode=mode, L=L, impl=backend, T=3)
            best = softmax(rows, case="sweep", mode=mode, L=L)
            if own is not None and best is not None:
                lengths.append(L)
                ratios.append(best.median / own.median)
        if not lengths:
            return None
        value = break_even(lengths, ratios)
        ahead = f"{'L ≤' if value == lengths[0] else 'L ≈'} {value:.0f}"
        return Measured(value, f"none up to L = {lengths[-1]}" if math.isinf(value) else ahead)

    return measure


def against_compiled(backend: str) -> Measure:
    """The compiled reference over the backend, forward, worst length."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        found = []
        for L in LONG:
            own = timed(rows, case="compiled", mode=FORWARD, L=L, impl=backend, T=3)
            other = timed(rows, case="compiled", mode=FORWARD, L=L, impl="compiled", T=3)
            if own is not None and other is not None:
                found.append((other.median / own.median, f"L = {L}"))
        return _worst(found, "×")

    return measure


def forward_over(case: str, lengths: Sequence[int], impls: Sequence[str], backend: str) -> Measure:
    """The fastest of `impls` over the backend at T = 3, forward, worst length."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        found = []
        for L in lengths:
            cells = {"case": case, "mode": FORWARD, "L": L}
            own = timed(rows, **cells, impl=backend, T=3)
            others = [
                row for impl in impls for row in find(rows, metric="time", **cells, impl=impl) if row.T in (None, 3)
            ]
            if own is not None and others:
                found.append((min(row.median for row in others) / own.median, f"L = {L}"))
        return _worst(found, "×")

    return measure


def resident_targets(backend: str) -> list[Target]:
    """Forward lines for the sizes that the CUDA C++ backend keeps on the chip."""
    return [
        Target("GPU", what, bound, "×", True, forward_over(case, lengths, impls, backend))
        for what, bound, case, lengths, impls in (
            ("forward against Triton, L = 256..2048, B·H = 128", 1.5, "sweep", (256, 512, 1024, 2048), ("triton",)),
            ("forward, share of the copy floor, L = 4096, B·H = 144", 0.5, "many heads", (4096,), ("copy",)),
            ("forward against the best SDPA, L = 196, B·H = 4096", 1, "windows", (196,), SOFTMAX),
            ("forward against the best SDPA, L = 49, B·H = 4096", 0.667, "windows", (49,), SOFTMAX),
        )
    ]


def host(backend: str) -> Measure:
    """Microseconds of host time before the first launch."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        found = find(rows, case="host", impl=backend)
        return Measured(1e6 * found[0].median, f"{1e6 * found[0].median:.3g} µs") if found else None

    return measure


def memory(backend: str) -> Measure:
    """Worst peak extra memory over the size of q, k, v, o."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        found = find(rows, case="memory", impl=backend)
        shares = [(row.median / row.work, f"L = {row.L}, T = {row.T}") for row in found]
        return _worst(shares, "×", least=False)

    return measure


def solver(impl: str) -> Measure:
    """Another Sinkhorn solver over the package's, worst size."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        found = find(rows, case="sinkhorn", impl=impl)
        return _worst([(row.ratio, f"{row.B}×{row.L}×{row.M}") for row in found], "×")

    return measure


def targets(backend: str) -> list[Target]:
    """The lines of the design for one backend."""
    even = {"triton": 1024, "cuda": 512}.get(backend, 1024)
    solvers = ("plain", "pot", "geomloss")
    shares = (
        ("max(bytes, exps, FLOPs), forward, L ≥ 16k", 70, of_floor(backend, 3)),
        ("copy floor, T = 3, forward, L ≥ 16k", 40, of_copy(backend, FORWARD, 3)),
        ("copy floor, T = 1, forward, L ≥ 16k", 60, of_copy(backend, FORWARD, 1)),
        ("copy floor, T = 3, forward + backward, L ≥ 16k", 45, of_copy(backend, BOTH, 3)),
        ("copy floor, T = 1, forward + backward, L ≥ 16k", 45, of_copy(backend, BOTH, 1)),
    )
    lines = [
        *(
            Target("GPU", f"forward against the best SDPA, L = {L}", bound, "×", True, against_softmax(L))
            for L, bound in ((4096, 6), (16384, 25), (65536, 100))
        ),
        *(Target("GPU", f"share of the {what}", bound, " %", True, measure) for what, bound, measure in shares),
        Target("GPU", "break-even with SDPA, forward + backward, B8", even, "", False, crossing(backend, BOTH)),
        Target("GPU", "against the compiled reference, forward, L ≥ 16k", 3, "×", True, against_compiled(backend)),
        Target("GPU", "host time before the first launch", 40, " µs", False, host(backend)),
        *(resident_targets(backend) if backend == "cuda" else ()),
        Target("any", "peak extra memory, forward + backward, × (q, k, v, o)", 0.25, "×", False, memory(backend)),
        *(Target("any", f"`sinkhorn` against {impl}", 10, "×", True, solver(impl)) for impl in solvers),
    ]
    return [replace(line, measure=_beside(backend, line.measure)) for line in lines]


def _beside(backend: str, measure: Measure) -> Measure:
    return lambda rows: measure(beside(rows, backend))


def times(rows: Sequence[Row]) -> str:
    """Every measured time, and why others are missing."""
    lines = ["| case | mode | B | L | implementation | T | beside | µs (quartiles) | |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.metric == "time":
            median, q25, q75 = (f"{1e6 * value:.4g}" for value in (row.median, row.q25, row.q75))
            cell = f"{median} ({q25}–{q75})" if row.status == OK else row.status
            T = "–" if row.T is None else row.T
            note = "" if row.note == "graph" else row.note.replace("|", "/")
            where = f"{row.case} | {row.mode} | {row.B} | {row.L} | {row.impl} | {T} | {row.backend or '–'}"
            lines.append(f"| {where} | {cell} | {note} |")
    return "\n".join(lines)


def render(rows: Sequence[Row], stamp: Mapping[str, str]) -> str:
    """The targets, the measured limits and every time, as markdown."""
    versions = f"torch {stamp['torch']}, commit {stamp['commit']}, {stamp['date']}"
    lines = [f"{stamp['device']}, bfloat16, H16 D64 M64; {versions}."]
    lines += [f"\nNot measured: `{row.impl}`, {row.note}." for row in rows if row.case == "check" and row.status != OK]
    for backend in dict.fromkeys(row.impl for row in rows if row.case == "check" and row.status == OK):
        lines += ["", f"| `{backend}` | what | target | measured (T = 3 unless named) | |", "|---|---|---|---|---|"]
        lines += [target.line(rows) for target in targets(backend)]
    measured = ", ".join(f"{name} {value:.4g} {unit}" for name, value, unit in
                         ((row.impl, row.median, row.unit) for row in find(rows, case="probe")))  # fmt: skip
    return "\n".join([*lines, "", f"Measured in the same run: {measured or 'nothing'}.", "", times(rows)])


def draw(rows: Sequence[Row], stamp: Mapping[str, str], path: Path) -> None:
    """Time against length, headline and sweep, both modes (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for line, case in zip(axes, ("headline", "sweep"), strict=True):
        for ax, mode in zip(line, (FORWARD, BOTH), strict=True):
            series: dict[str, list[Row]] = {}
            shown = beside(rows, next((row.backend for row in reversed(rows) if row.impl == row.backend), ""))
            for row in sorted(find(shown, case=case, mode=mode, metric="time"), key=lambda row: row.L or 0):
                series.setdefault(row.impl if row.T is None else f"{row.impl}, T = {row.T}", []).append(row)
            for name, found in series.items():
                colour = COLOURS.get(name.split(",")[0].split()[0])
                style = "--" if "T = 1" in name or name == "copy" else "-"
                lengths, medians = [r.L or 0 for r in found], [1e6 * r.median for r in found]
                ax.plot(lengths, medians, "o" + style, color=colour, label=name)
            ax.set(xscale="log", yscale="log", title=f"{case}, {mode}", xlabel="length L = S", ylabel="µs")
            if series:
                ax.legend(fontsize=7)
    figure.suptitle(f"{stamp['device']}, bfloat16, torch {stamp['torch']}, {stamp['commit']}", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
