"""benchmarks.quality.long: a run in pieces is the run, and lengths are those that are asked for."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from benchmarks.quality import long
from benchmarks.quality.tasks import Budget, listops_task, text_task
from benchmarks.quality.train import VARIANTS, Variant
from benchmarks.tasks import listops

SMALL = listops_task("small", (20, 60), Budget(6, 4, 1e-2, train=30, test=10))
LONGER = {task.name: task for task in long.TASKS}


def variant(name: str) -> Variant:
    return next(one for one in VARIANTS if one.name == name)


@pytest.mark.parametrize("name", long.NAMES)
def test_a_run_in_pieces_is_the_run(name: str, tmp_path: Path) -> None:
    whole = long.Run(SMALL, variant(name), 0, tmp_path / "whole")
    rows = list(whole.rows(lambda: True, every=2))
    assert [row.step for row in rows] == [2, 4, 6]
    found = []
    for _ in range(10):
        turns = itertools.count()
        piece = long.Run(SMALL, variant(name), 0, tmp_path / "pieces")
        found += piece.rows(lambda turns=turns: next(turns) < 1, every=2)
    assert [replace(row, cpu_seconds=0.0) for row in found] == [replace(row, cpu_seconds=0.0) for row in rows]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(piece.model.state_dict()[name], value), name
    assert rows[-1].cpu_seconds > rows[0].cpu_seconds > 0


def test_lengths_are_those_of_the_arena() -> None:
    found = listops.samples(30, 0, listops.ARENA)
    assert all(500 <= len(tokens) <= 2000 for tokens, _ in found)
    assert LONGER["listops2k"].data(Budget(1, 2, 1e-3, train=4, test=3)).tokens.shape[1] <= 2000
    for name, length in (("text2k", 2048), ("text4k", 4096)):
        assert LONGER[name].data(Budget(1, 2, 1e-3, test=3)).tokens.shape == (3, length)
    assert text_task("text", 32, Budget(1, 2, 1e-3, test=3)).data(Budget(1, 2, 1e-3, test=3)).tokens.shape == (3, 32)


def test_the_command_goes_on_and_shows_the_last_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long, "TASKS", (SMALL,))
    told = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--seeds", "1", "--variant", "SeT, T = 1"]
    assert long.main([*told, "--minutes", "0"]) == 0
    assert long.main(told) == 0
    (row,) = long.read(tmp_path / "quality_long.csv")
    assert (row["step"], row["steps"], row["variant"]) == ("6", "6", "SeT, T = 1")
    assert (tmp_path / "quality_long.png").exists()
    shutil.rmtree(tmp_path / "work")
    assert long.main(told) == 0, "what the results have whole needs no checkpoint"
    assert long.read(tmp_path / "quality_long.csv") == [row]
    long.write(tmp_path / "quality_long.csv", [{**row, "step": "5"}])
    assert long.main(told) == 0
    assert [r["step"] for r in long.read(tmp_path / "quality_long.csv")] == ["6"], "rows without a checkpoint are anew"
    capsys.readouterr()
    assert long.main(["table", str(tmp_path / "quality_long.csv")]) == 0
    assert "| small | SeT, T = 1 | " in capsys.readouterr().out


def test_the_page_shows_where_every_run_of_the_results_ended() -> None:
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs" / "quality.md").read_text()
    (name,) = re.findall(r"\(../benchmarks/results/(long_\S+\.csv)\)", page)
    last: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in long.read(root / "benchmarks" / "results" / name):
        last.setdefault((row["variant"], row["task"]), {})[row["seed"]] = row
    assert all(row["step"] == row["steps"] for seeds in last.values() for row in seeds.values())
    for variant in dict.fromkeys(variant for variant, _ in last):
        cells = [cell(last.get((variant, task.name), {}).values()) for task in long.TASKS]
        assert f"| {variant} | {' | '.join(cells)} |" in page


def cell(seeds: Collection[dict[str, str]]) -> str:
    """The last scores of one attention on one task, and its mean CPU seconds a step."""
    if not seeds:
        return "not measured yet"
    scores = " / ".join(f"{100 * float(row['score']):.1f}" for row in seeds)
    return f"{scores}, {mean(float(row['cpu_seconds']) / int(row['step']) for row in seeds):.2f} s"
