"""Several ranks: every case of tests/ranked on two gloo processes, and what needs none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run

import setformer_kernels as sk

RANKED = Path(__file__).parent / "ranked"


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    run(sorted(RANKED.glob("*.py")), 2, tmp_path)


@pytest.mark.slow
def test_four_ranks_in_two_dimensions_are_one_process(tmp_path: Path) -> None:
    run(sorted((RANKED / "four").glob("*.py")), 4, tmp_path)


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, setformer_kernels as sk; assert 'torch.distributed.tensor' not in sys.modules;"
        " sk.distributed.SeTParallel(); assert 'torch.distributed.tensor' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert {"SeTParallel", "full_state_dict"} <= set(sk.distributed.__all__)
    with pytest.raises(AttributeError, match="'nothing'"):
        sk.distributed.nothing  # noqa: B018
