"""Models of transformers and timm, and recipes, on several ranks: the cases of tests/models/ranked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from recipe_helpers import metrics, recipe
from safetensors.torch import load_file

from setformer_kernels.models.transformers import SeTformerForSequenceClassification, SeTformerTextConfig
from setformer_kernels.recipes.glue_tasks import TASKS, read_examples
from setformer_kernels.recipes.samples import write_digits, write_glue, write_scenes, write_texts
from setformer_kernels.recipes.wordpiece import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run

RANKED = Path(__file__).parent / "ranked"
# A checkpoint after two steps of three or four.
TRAINING = ["--cpu", "--epochs", 1, "--save-every", 2]
LONGEST = 48  # tokens of a sentence
RUNS: dict[str, list[object]] = {
    "classify": [
        "classify", "digits", "--model", "setformer_nano", "--image-size", 32, "--no-flip", "--drop-path", 0, *TRAINING
    ],
    "lm": ["lm", "texts", "--size", "tiny", "--references", 8, "--length", 64, "--samples", 0, *TRAINING,
           "--epochs", 0.2],
    "glue": ["glue", "sst2", "sst2", "--pretrained", "encoder", "--max-length", LONGEST, *TRAINING],
    "segment": [
        "segment", "scenes", "--model", "setformer_nano", "--classes", 3, "--head-channels", 16, "--crop-size", 64,
        *TRAINING,
    ],
}  # fmt: skip
RUNS["shared"] = RUNS["lm"]  # by two ranks with half of every window each
ON_ONE = ["--batch-size", 8]
ON_TWO: dict[str, list[object]] = {"": ["--batch-size", 4], "shared": ["--batch-size", 8, "--context-parallel", 2]}


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
            assert {key: found[key] for key in one} == pytest.approx(one, rel=1e-4), (name, other)
            same_weights(Path(f"one/{name}"), Path(f"{other}/{name}"))
    run([RANKED / "four" / "shared.py"], 4, tmp_path)
    same_weights(Path("one/shared"), Path("four/shared"))
    assert metrics(Path("four/evaluated")) == pytest.approx(metrics(Path("evaluated_by_one/shared")), rel=1e-5)


def write_data() -> None:
    """Batches of 8, all of them full, and to hold out."""
    write_digits(Path("digits"), 24)
    for path in sorted(Path("digits").glob("val/*/*.png")):
        if int(path.stem) > 120:  # 31 of them are enough, of all classes
            path.unlink()
    write_texts(Path("texts"), 20)
    write_glue(Path("sst2"), "sst2", 24)
    write_encoder(Path("encoder"))
    write_scenes(Path("scenes"), 24)


def write_encoder(folder: Path) -> None:
    """A small one without dropout, which draws other numbers on every rank."""
    texts = [text for row in read_examples(Path("sst2/train.tsv"), TASKS["sst2"]) for text in row.sentences]
    tokenizer = train_tokenizer(texts, 200)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    SeTformerForSequenceClassification(SeTformerTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        num_references=8, max_position_embeddings=LONGEST, pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )).save_pretrained(folder)  # fmt: skip


def same_weights(one: Path, other: Path) -> None:
    wanted, found = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)


def later(folder: str, names: list[str]) -> set[str]:
    """Of a run's files, what it wrote after its first checkpoint."""
    return {name for name in names if (name.startswith("checkpoint-") and name != "checkpoint-2") or name == "model"}
