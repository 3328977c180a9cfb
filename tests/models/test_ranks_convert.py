"""The recipe that converts a model, on two ranks: what one process converts with the same batches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from recipe_helpers import recipe
from safetensors.torch import load_file
from test_recipe_convert import words  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run

RUN = [
    "convert", "model", "--data", "texts", "--length", 24, "--references", 8, "--steps", 6, "--tune-steps", 4,
    "--save-every", 2, "--recording", "kept", "--cpu",
]  # fmt: skip
# A relative error is no mean over samples: two batches are two batches.
ON_ONE, ON_TWO = ["--batch-size", 4, "--accumulate", 2], ["--batch-size", 4]


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_does(
    words: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.chdir(words)
    run([Path(__file__).parent / "ranked" / "recipes" / "convert.py"], 2, words)
    recipe(*RUN, *ON_ONE, "--output", "one")
    one, two = (load_file(f"{name}/model/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)
    reports = [Path(name, "outputs.csv").read_text().splitlines() for name in ("one", "two")]
    assert len(reports[0]) == len(reports[1]) > 3
