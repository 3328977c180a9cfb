"""Models of transformers and timm, and recipes, on several ranks: the cases of tests/models/ranked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from recipe_helpers import metrics, recipe
from safetensors.torch import load_file

from setformer_kernels.recipes.samples import write_digits, write_glue, write_scenes, write_texts

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run

RANKED = Path(__file__).parent / "ranked"
IMAGES = ["--model", "setformer_nano", "--cpu"]
# A checkpoint after two steps of three or four.
TRAINING = ["--cpu", "--epochs", 1, "--save-every", 2]
RUNS: dict[str, list[object]] = {
    "classify": [
        "classify", "digits", "--model", "setformer_nano", "--image-size", 32, "--no-flip", "--drop-path", 0, *TRAINING
    ],
    "lm": ["lm", "texts", "--size", "tiny", "--references", 8, "--length", 64, "--samples", 0, *TRAINING,
           "--epochs", 0.2],
    "glue": ["glue", "sst2", "sst2", "--size", "tiny", "--references", 8, "--max-length", 48, *TRAINING],
    "segment": [
        "segment", "scenes", "--model", "setformer_nano", "--classes", 3, "--head-channels", 16, "--crop-size", 64,
        *TRAINING,
    ],
}  # fmt: skip
ON_ONE, ON_TWO = ["--batch-size", 8], ["--batch-size", 4]
EXACT = ("classify", "lm")  # the others have dropout, and batch statistics


def evaluation(name: str) -> list[object]:
    """Of the model that one process has trained, in batches that do not divide what is held out."""
    return [*RUNS[name], "--batch-size", 7, "--evaluate", f"one/{name}/model"]


def test_models_on_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    run(sorted(RANKED.glob("*.py")), 2, tmp_path)


@pytest.mark.slow
def test_recipes_on_two_ranks_score_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data()
    for name, arguments in RUNS.items():
        recipe(*arguments, *ON_ONE, "--output", f"one/{name}")
        shutil.copytree(f"one/{name}", f"from_one/{name}", ignore=later)
        recipe(*evaluation(name), "--output", f"evaluated_by_one/{name}")
    run([RANKED / "recipes" / "recipes.py"], 2, tmp_path)
    for name, arguments in RUNS.items():
        one, evaluated = metrics(Path(f"one/{name}")), metrics(Path(f"evaluated/{name}"))
        by_one = metrics(Path(f"evaluated_by_one/{name}"))
        if name in ("classify", "glue"):  # whose last batch's loss counts what fills it up
            for loss in (one, evaluated, by_one):
                loss.pop("loss")
        assert evaluated == pytest.approx(by_one, rel=1e-5)
        shutil.copytree(f"two/{name}", f"from_two/{name}", ignore=later)
        recipe(*arguments, *ON_ONE, "--output", f"from_two/{name}", "--resume")
        for other in ("two", "from_one", "from_two"):
            found = metrics(Path(f"{other}/{name}"))
            assert one.keys() <= found.keys()
            if name in EXACT:
                assert {key: found[key] for key in one} == pytest.approx(one, rel=1e-4)
                same_weights(Path(f"one/{name}"), Path(f"{other}/{name}"))


def write_data() -> None:
    """Batches of 8, all of them full, and to hold out."""
    write_digits(Path("digits"), 24)
    for path in sorted(Path("digits").glob("val/*/*.png")):
        if int(path.stem) > 120:  # 31 of them are enough, of all classes
            path.unlink()
    write_texts(Path("texts"), 20)
    write_glue(Path("sst2"), "sst2", 24)
    write_scenes(Path("scenes"), 24)


def same_weights(one: Path, other: Path) -> None:
    wanted, found = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)


def later(folder: str, names: list[str]) -> set[str]:
    """Of a run's files, what it wrote after its first checkpoint."""
    return {name for name in names if (name.startswith("checkpoint-") and name != "checkpoint-2") or name == "model"}
