"""Barriers of the CUDA kernels: what the shim sees of a missing one, and that none is missing.

The table of mutants (benchmarks/results/cuda_barriers.csv) says of every barrier what shows that it is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from test_cuda_kernels import shim

from benchmarks.compiled import barriers, mutants
from setformer_kernels.backends import cuda

__all__ = ["shim"]  # a fixture

# By which schedules a probe shows that its barrier is missing; by its race each does.
SHOWN = {
    "block": {"any", "warp", "block"},
    "block behind shuffles": {"warp"},
    "cluster behind barriers of the block": {"block"},
    "cluster before the end": {"any", "warp", "block"},
    "warp behind shuffles": set(),
    "copy": {"any", "warp", "block"},
}


def found(shim: ModuleType, probe: str, barrier: bool) -> dict[str, str]:
    """Schedule -> what all threads found, as text: some of it is NaN."""
    results = {}
    for schedule in shim.SCHEDULES:
        shim.set_schedule(schedule)
        results[schedule] = str(shim.probe(probe, barrier))
    shim.set_schedule(shim.SCHEDULES[0])
    return results


def race(shim: ModuleType, probe: str, barrier: bool) -> str:
    shim.watch_races(True)
    shim.probe(probe, barrier)
    shim.watch_races(False)
    return shim.found_race()


@pytest.mark.parametrize("probe", SHOWN)
def test_the_shim_shows_a_missing_barrier(probe: str, shim: ModuleType) -> None:
    right = found(shim, probe, True)
    assert len(set(right.values())) == 1
    assert race(shim, probe, True) == ""
    wrong = found(shim, probe, False)
    assert {name.split()[0] for name, result in wrong.items() if result not in right.values()} == SHOWN[probe]
    assert "with no barrier between" in race(shim, probe, False)


def test_every_probe_is_judged(shim: ModuleType) -> None:
    assert set(SHOWN) == set(shim.PROBES)


@pytest.mark.parametrize("name", barriers.CASES)
def test_no_race(name: str, shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_C", shim)
    assert barriers.race(shim, barriers.CASES[name]) == ""


@pytest.mark.parametrize("name", barriers.CASES)
def test_every_schedule_agrees_bit_for_bit(name: str, shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_C", shim)
    case = barriers.CASES[name]
    assert barriers.deviating(shim, case, shim.SCHEDULES[1:], barriers.digest(case)) == ""


def test_every_barrier_of_the_kernels_is_needed() -> None:
    """Renew the table with python -m benchmarks.compiled.mutants after a change of barriers."""
    table = mutants.committed()
    assert {row.mutant for row in table} == set(mutants.mutants())
    unseen = {str(row.mutant) for row in table if not any(row.seen.values())}
    assert unseen == mutants.UNSEEN.keys()


def test_places_of_barriers_are_found_by_their_functions(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text(
        "SFK_DEVICE void wait(int t) {\n  t ? copies_wait<kOf<T> - 1>() : copies_wait<0>();  // sync_block()\n"
        "  sync_block();\n}\nSFK_KERNEL(kThreads, 1)\nsome_kernel(const P p) {\n  sync_block();\n}\n"
    )
    assert [site[1:] for site in mutants.sites(tmp_path)] == [
        ("wait", "copies_wait", 1), ("wait", "copies_wait", 2), ("wait", "sync_block", 1),
        ("some_kernel", "sync_block", 1)]  # fmt: skip
