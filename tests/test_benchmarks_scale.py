"""The benchmark of one sequence over ranks: what it streams is attention, and its model counts what is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import setformer_kernels.functional as SF
from benchmarks.common.hardware import ROOT
from benchmarks.scale import costs
from benchmarks.scale.__main__ import main
from benchmarks.scale.equality import budget_used
from benchmarks.scale.streamed import Plan, Tokens, run

RESULTS = ROOT / "benchmarks" / "results"


def test_what_ranks_stream_is_one_call_on_all_tokens() -> None:
    plan = Plan(tokens=2**13, ranks=4)
    found, sent = run(plan)
    made = Tokens(plan)
    q, k, v, d_o = (torch.cat([made.of(rank, kind).clone() for rank in range(4)], 2) for kind in range(4))
    y = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(9))
    leaves = [t.requires_grad_() for t in (q, k, v, y)]
    o = SF.set_attention(*leaves, num_iters=3, backend="cpu")
    grads = torch.autograd.grad(o, leaves, d_o)
    for name, whole in zip(("output", "query", "key", "value"), (o.detach(), *grads), strict=False):
        norm = sum(one.squares[name] for one in found) ** 0.5
        assert norm == pytest.approx(whole.double().norm().item(), rel=1e-6), name
    torch.testing.assert_close(sum(one.references for one in found), grads[3], rtol=1e-4, atol=1e-5)
    assert sum(sent[:3]) == sum(sent[3:]) == 17152
    assert max(one.rows_sum for one in found) < 2e-6


def test_many_ranks_are_one_within_the_error_budget(tmp_path: Path) -> None:
    used = budget_used(Plan(tokens=2**15 + 5, ranks=8))
    assert set(used) == {"output", "query", "key", "value", "references"}
    assert max(used.values()) <= 1, used
    out = tmp_path / "equal.csv"
    assert main(["equal", "--tokens", "999", "--ranks", "2", "--threads", "1", "--out", str(out)]) == 0
    assert out.read_text().startswith("tokens,ranks,of_output")


def test_the_model_counts_what_ranks_send() -> None:
    of = costs.Layer(heads=1)
    for ranks in (8, 1024):
        one = {c.impl: c for c in costs.costs(2**20, ranks, {"set": 1.0, "sdpa": 1.0}, costs.Machine(), of)}
        assert one["set"].bytes == 2 * (ranks - 1) * 17152
        assert one["ring"].bytes == pytest.approx(6 * (ranks - 1) / ranks * 2**20 * 64 * 2)
        assert "ulysses" not in one  # one head has nobody to share it with
    wide = [c for c in costs.table(RESULTS) if c.impl == "ulysses"]
    assert {c.ranks for c in wide} == {8, 16}


def test_the_committed_table_is_that_of_the_model(tmp_path: Path) -> None:
    assert main(["model", "--out", str(tmp_path / "model.md")]) == 0
    assert (tmp_path / "model.md").read_text() == (RESULTS / "scale_model.md").read_text()


def test_the_command_writes_a_row(tmp_path: Path) -> None:
    out = tmp_path / "scale.csv"
    assert main(["run", "--tokens", "4096", "--ranks", "2", "--threads", "1", "--out", str(out)]) == 0
    lines = out.read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("tokens,ranks,seconds")
