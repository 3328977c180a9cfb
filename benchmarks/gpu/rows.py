"""Rows of a GPU's results: empty, filled with samples, set against others of the same rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.common.measure import paired_ratio, quartiles
from benchmarks.common.results import OK, SKIPPED, Row
from benchmarks.gpu.cases import GpuCase

OUT_OF_TIME = "out of time"


def blank(case: GpuCase, impl: str, T: int | None, backend: str, **changes: Any) -> Row:
    """A row that is not measured; `backend` is the one that it is measured beside, by one process."""
    values = {"metric": "time", "unit": "s", "note": OUT_OF_TIME, "work": float(case.token_bytes())} | changes
    sizes = {"B": case.B, "H": case.H, "L": case.L, "M": case.M, "D": case.D}
    dtype = str(case.dtype).removeprefix("torch.")
    return Row(case.name, impl, case.mode, status=SKIPPED, T=T, dtype=dtype, backend=backend, **sizes, **values)


def filled(row: Row, samples: Sequence[float], note: str = "") -> Row:
    """The row with the quartiles of its samples."""
    q25, median, q75 = quartiles(samples)
    return replace(row, status=OK, note=note, runs=len(samples), q25=q25, median=median, q75=q75)


def against(row: Row, taken: Sequence[float], base: Sequence[float] | None, at_t1: Sequence[float] | None) -> Row:
    """The row with its ratios to SeT in the same rounds."""
    if base:
        q25, median, q75 = paired_ratio(taken, base)
        row = replace(row, ratio=median, ratio_q25=q25, ratio_q75=q75)
    if at_t1:
        q25, median, q75 = paired_ratio(taken, at_t1)
        row = replace(row, ratio_t1=median, ratio_t1_q25=q25, ratio_t1_q75=q75)
    return row


def brief(rows: Sequence[Row]) -> str:
    """The times of a case in a line."""

    def one(row: Row) -> str:
        name = row.impl if row.T is None else f"{row.impl} T={row.T}"
        return f"{name} {1e6 * row.median:.1f} µs" if row.status == OK else f"{name} {row.status}"

    return ", ".join(map(one, rows))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, cut to what a cell holds."""
    lines = str(error).strip().splitlines()
    return lines[0][:250] if lines else "no message"
