"""`python -m benchmarks.cpu.modules`: what it times, writes and says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.common.cases import MODES
from benchmarks.common.results import read_csv
from benchmarks.cpu import modules


def test_its_cases_are_short_sequences_at_both_batches() -> None:
    found = list(modules.cases(quick=False))
    assert {c.L for c in found} == {16, 49, 64, 128, 197, 256}
    assert {(c.B, c.H * c.D) for c in found} == {(1, 384), (32, 384)}
    assert len(found) == 6 * 2 * 2 * 2


def test_a_quick_run_times_both_modules_and_their_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(modules, "HOST_CALLS", 2)
    monkeypatch.setattr(
        modules, "cases", lambda quick: (modules.Case(5, 1, 2, torch.float32, m, modules.MODULE, 8, 4) for m in MODES)
    )
    assert modules.main(["--quick", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("modules_*.csv")
    rows = read_csv(file)[0]
    kinds = [(case, mode, impl) for case in (modules.HOST, modules.MODULE) for mode in MODES for impl in modules.IMPLS]
    assert [(row.case, row.mode, row.impl) for row in rows] == kinds
    assert all(0 < row.q25 <= row.median <= row.q75 for row in rows)
    capsys.readouterr()
    assert modules.main(["table", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"| 5 | {1 / rows[5].ratio:.2f} | {1 / rows[7].ratio:.2f} |" in said
    assert f"forward: {1e6 * rows[0].median:.0f} µs, softmax {1e6 * rows[1].median:.0f}" in said


def test_calls_ask_for_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    case = modules.Case(5, 1, 2, torch.float32, MODES[0], modules.MODULE, 8, 4)
    for module in case.modules().values():
        assert case.call(module)()[1] is None  # type: ignore[index]
