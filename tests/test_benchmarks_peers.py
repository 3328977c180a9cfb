"""`python -m benchmarks.cpu.peers`: what counts as reached, what it writes, resumes and says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.common.results import FAILED, OK, SKIPPED, UNAVAILABLE, Row, read_csv
from benchmarks.cpu import peer_solvers, peers
from benchmarks.cpu.peer_solvers import SOLVERS
from setformer_kernels import advice

CASE = peers.Case(2, 30, 6, 0.05)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(advice, "enabled", False)


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if not solver.missing()])
def test_solvers_agree_on_the_plan(name: str) -> None:
    l = CASE.log_kernel(0.1, torch.float64)
    want = peer_solvers._ours(l, 1e-12, 5000)
    found = SOLVERS[name].potentials(l, 1e-9, 2000)
    plans = [(l + g.unsqueeze(-2)).softmax(-1) for g in (want, found)]
    assert (plans[1] - plans[0]).norm() <= (1e-2 if SOLVERS[name].counted else 1e-6) * plans[0].norm()
    gradient, weight = SOLVERS[name].gradient, torch.rand(l.shape, dtype=l.dtype)
    if gradient is not None:
        exact = peer_solvers._ours_gradient(l, 1e-12, 5000, weight, backend="reference")
        found = gradient(l, 1e-9, 200, weight)
        assert (found - exact).norm() <= 1e-4 * exact.norm()


def test_a_tolerance_is_tightened_until_the_error_is_reached() -> None:
    asked: list[float] = []

    def potentials(l: Tensor, tolerance: float, most: int) -> Tensor:
        asked.append(tolerance)
        return peer_solvers._ours(l, 0.0, 0 if tolerance > 2e-4 else 300)

    l = CASE.log_kernel(0.1, torch.float64)
    found = peers.reach(replace_potentials(potentials), l, 1e-3, 10.0)
    assert asked[2:] == [1e-3, 2.5e-4, 6.25e-5]
    assert (found.tolerance, found.error <= 1e-3) == (6.25e-5, True)
    exact = (l + peer_solvers._ours(l, 1e-14, 5000).unsqueeze(-2)).softmax(-1).sum(-2) / 30
    assert peers.error_of(l, torch.zeros(2, 6, dtype=l.dtype)) > 0.1
    torch.testing.assert_close(exact, torch.full_like(exact, 1 / 6))


def replace_potentials(potentials: object) -> peer_solvers.Solver:
    return SOLVERS["set"]._replace(potentials=potentials)  # type: ignore[arg-type]


def test_a_run_writes_rows_resumes_and_prints_their_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stuck = replace_potentials(lambda l, tolerance, most: l.new_zeros(l[:, 0].shape))
    own = {"set": SOLVERS["set"], "pot": stuck, "ott": stuck._replace(module="not_installed")}
    monkeypatch.setattr(peers, "SOLVERS", own)
    monkeypatch.setattr(peers, "QUICK", (CASE,))
    monkeypatch.setattr(peers, "EPSILONS", (0.1, 0.05))
    file = tmp_path / f"peers_{peers.stamp(1, 'cpu').date}.csv"

    def gradient(case: peers.Case, threads: int) -> list[Row]:
        return [replace(read_csv(file)[0][0], case="peers, 2x30x6, gradient")]

    monkeypatch.setattr(peers, "gradient_rows", gradient)
    assert peers.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = read_csv(file)[0]
    assert [row.status for row in rows[:3]] == [OK, FAILED, UNAVAILABLE]
    assert [row.status for row in rows[6:9]] == [OK, SKIPPED, UNAVAILABLE]
    assert rows[0].ratio == 1
    assert rows[1].note.startswith("error ")
    monkeypatch.setattr(peers, "rows_of", lambda *_: pytest.fail("measured again"))
    assert peers.main(["--quick", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert peers.main(["table", str(file)]) == 0
    assert "| 2x30x6, epsilon 0.1, error 0.001 | " in capsys.readouterr().out


def test_a_gradient_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SOLVERS", {"set": SOLVERS["set"]})
    time, memory = peers.gradient_rows(replace(CASE, seconds=5.0), 1)
    assert (time.status, memory.status, time.ratio) == (OK, OK, 1)
    assert time.median > 0
    assert memory.median >= 0
