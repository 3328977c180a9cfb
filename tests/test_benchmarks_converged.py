"""`python -m benchmarks.cpu.converged`: what it counts, writes and says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.common.results import read_csv
from benchmarks.cpu import converged


def test_passes_are_the_first_that_suffice() -> None:
    l = converged.Case("random D = 3", 0.05, S=60, M=5).log_kernel()
    for name, count in (("newton", converged.newton_passes), ("sinkhorn", converged.sinkhorn_passes)):
        passes, error = count(l)
        g = converged.sinkhorn(l, num_iters=passes, **converged.HOW[name])[1]
        assert converged.error_of(l, g) == pytest.approx(error, rel=0.5)
        assert error <= converged.ERROR < converged.error_of(l, torch.zeros_like(g))
        assert passes > 2
        before = converged.sinkhorn(l, num_iters=passes - 1, **converged.HOW[name])[1]
        assert converged.error_of(l, before) > converged.ERROR


def test_a_run_writes_rows_and_prints_their_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = converged.Case("clusters D = 8", 0.05, S=50, M=4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(converged, "cases", lambda quick: iter([case]))
    assert converged.main(["--quick", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("converged_*.csv")
    rows = read_csv(file)[0]
    assert [row.impl for row in rows] == list(converged.HOW)
    assert rows[0].T < rows[1].T == rows[2].T
    assert rows[0].ratio == 1
    capsys.readouterr()
    assert converged.main(["table", str(file)]) == 0
    assert f"| clusters D = 8, epsilon 0.05 | {rows[0].T}, " in capsys.readouterr().out
