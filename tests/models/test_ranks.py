"""Models of transformers and timm on several ranks: every case of tests/models/ranked on two gloo processes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run

CASES = sorted((Path(__file__).parent / "ranked").glob("*.py"))


def test_models_on_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    assert CASES
    run(CASES, 2, tmp_path)
