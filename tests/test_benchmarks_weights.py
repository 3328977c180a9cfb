"""`python -m benchmarks.cpu.weights`: what it times, writes and says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.common.cases import MODES
from benchmarks.common.results import read_csv
from benchmarks.cpu import weights


def test_a_quick_run_times_both_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {c.L for c in weights.cases(quick=False)} == {64, 128, 256, 512, 1024}
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(
        weights, "cases", lambda quick: (weights.Case(5, 2, 2, torch.float32, m, weights.AVERAGED, 8, 4) for m in MODES)
    )
    assert weights.main(["--quick", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("weights_*.csv")
    rows = read_csv(file)[0]
    assert [(row.impl, row.mode) for row in rows] == [(i, m) for m in MODES for i in (weights.SET, weights.SOFTMAX)]
    assert all(0 < row.q25 <= row.median <= row.q75 for row in rows)
    capsys.readouterr()
    assert weights.main(["table", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 + len(MODES)
    assert f"{1 / rows[1].ratio:.2f}" in said[2]
