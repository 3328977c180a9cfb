"""The table of errors over budgets: what it keeps, and that nothing in it is near failing without a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.common.hardware import ROOT
from benchmarks.cpu import budget


def row(ratio: float, op: str = "attention", case: str = "plain", seed: int = 0) -> budget.Row:
    return budget.Row("as it is", "cpu", "float32", op, case, seed, "key", "norm", ratio)


def test_no_committed_ratio_is_near_the_budget_without_a_reason() -> None:
    (table,) = (ROOT / "benchmarks" / "results").glob("budget_*.csv")
    rows = budget.read(table)
    assert {r.backend for r in rows} == set(budget.BACKENDS)
    assert budget.unexplained(rows) == []
    assert all(r.ratio <= 1 for r in rows)


def test_the_summary_keeps_the_worst_row_of_a_result() -> None:
    assert budget.summary([row(0.4), row(0.7, seed=1), row(0.6)]) == [row(0.7, seed=1)]
    assert budget.unexplained([row(0.79), row(0.81), row(0.9, case="length_1")]) == [row(0.81)]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def measured(op: str, case: str, dtype: str, backend: str, seed: int) -> list[tuple[str, str, float]]:
        asked.append((op, case))
        return [("key", "norm", 0.5)]

    monkeypatch.setattr(budget, "measured", measured)
    monkeypatch.setattr(budget, "tasks", lambda *_: [("attention", "plain"), ("attention", "dot")])
    monkeypatch.setattr(budget, "DTYPES", {"cpu": ("float32",)})
    table = tmp_path / "table.csv"
    budget.append(table, [row(0.25)])
    budget.main(["--here", "--settings", "as it is", "--backends", "cpu", "--seeds", "1", "--out", str(table)])
    assert asked == [("attention", "dot")]
    assert budget.read(table) == [row(0.25), row(0.5, case="dot")]


def test_ratios_are_what_the_tests_judge() -> None:
    found = list(budget.measured("small", "positions", "float32", "cpu", 0))
    assert {(name, statistic) for name, statistic, _ in found} == {
        ("position_scale", "typical"),
        ("reference_position", "typical"),
    }
    assert all(0 < ratio < budget.LIMIT for *_, ratio in found)
