"""The recipes on small data sets in the real formats: learned scores, exact resuming, and what bad input gets."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from recipe_helpers import fails, metrics, recipe
from safetensors.torch import load_file, save_file
from torch import nn

from setformer_kernels.models.transformers import SeTformerForMaskedLM, SeTformerTextConfig
from setformer_kernels.recipes.__main__ import main
from setformer_kernels.recipes.errors import RecipeError
from setformer_kernels.recipes.glue_tasks import TASKS, read_examples
from setformer_kernels.recipes.samples import write_digits, write_glue, write_scenes
from setformer_kernels.recipes.segment import MeanIou, confusion, with_one_norm

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
SMALL_IMAGES = ["--model", "setformer_nano", "--image-size", "32", "--no-flip", "--cpu"]
SMALL_TEXT = ["--size", "tiny", "--references", "8", "--max-length", "48", "--cpu"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.mark.slow
def test_digits_are_learned_and_the_saved_model_scores_the_same(digits: Path, tmp_path: Path) -> None:
    training = ["--epochs", 2, "--batch-size", 64, "--learning-rate", "2e-3", "--min-scale", 0.6]
    recipe("classify", digits, "--output", tmp_path / "run", *SMALL_IMAGES, *training)
    measured = metrics(tmp_path / "run")
    assert measured["top1"] > 0.85
    assert measured["top5"] > 0.98
    assert (tmp_path / "run" / "curve.png").stat().st_size > 10_000
    curve = (tmp_path / "run" / "curve.csv").read_text()
    assert "\n10,loss," in curve
    assert curve.count(",eval_top1,") == 3  # after both epochs, and at the end
    recipe("classify", digits, "--output", tmp_path / "again", *SMALL_IMAGES, "--evaluate", tmp_path / "run" / "model")
    assert metrics(tmp_path / "again") == pytest.approx(measured)
    assert not (tmp_path / "again" / "model").exists()


def killed_after_a_checkpoint(arguments: list[object], checkpoint: Path) -> None:
    """Starts the recipe in a process of its own and kills it once the checkpoint is complete."""
    command = [sys.executable, "-m", "setformer_kernels.recipes", *(str(argument) for argument in arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start = time.monotonic()
    while not (checkpoint / "complete").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() - start < 120
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(few_digits: Path, tmp_path: Path) -> None:
    """Two epochs of six steps, with everything random there is: crops, stochastic depth, the order of the samples."""
    arguments = ["classify", few_digits, *SMALL_IMAGES, "--epochs", 2, "--batch-size", 16, "--save-every", 4,
                 "--drop-path", 0.3, "--workers", 1]  # fmt: skip
    recipe(*arguments, "--output", tmp_path / "whole")
    broken = tmp_path / "broken"
    killed_after_a_checkpoint([*arguments, "--output", broken], broken / "checkpoint-4")
    (broken / "checkpoint-11").mkdir()  # as if killed while writing it
    recipe(*arguments, "--output", broken, "--resume")
    assert not (broken / "checkpoint-11").exists()
    want, got = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "broken"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)
    assert metrics(broken) == metrics(tmp_path / "whole")


def test_all_switches_at_once(few_digits: Path, tmp_path: Path) -> None:
    switches = ["--precision", "bf16", "--gradient-checkpointing", "--accumulate", 2, "--pool", "set", "--workers", 1]
    recipe("classify", few_digits, "--output", tmp_path, *SMALL_IMAGES, "--epochs", 1, "--batch-size", 16, *switches)
    assert np.isfinite(list(metrics(tmp_path).values())).all()
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    write_glue(tmp_path / "data", "sst2", 64)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["glue", "sst2", tmp_path / "data", "--output", tmp_path / "run", *SMALL_TEXT, "--epochs", 1]
    command = [*launch, "-m", "setformer_kernels.recipes", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(metrics(tmp_path / "run")) == {"loss", "accuracy"}
    assert (tmp_path / "run" / "checkpoint-1").is_dir()  # 64 texts are one step of 32 on each


def tree(folder: Path, *images: str) -> Path:
    for name in images:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        transformers.image_utils.PIL.Image.new("RGB", (40, 40)).save(path)
    return folder


def test_what_bad_images_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(data: Path, *more: object) -> str:
        run = ("--output", tmp_path / "out", "--epochs", 1, *more)
        return fails(capsys, "classify", data, *SMALL_IMAGES, *run)

    good = tree(tmp_path / "good", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    assert f"{tmp_path / 'no' / 'val'} must hold one folder of images for each class" in message(tmp_path / "no")
    assert "--image-size must be ≥ 32, got 16" in message(good, "--image-size", 16)
    other = tree(tmp_path / "other", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png")
    assert "train and val must have the same classes, they differ in ['b', 'c']" in message(other)
    (other / "val" / "c" / "1.png").unlink()
    assert "Found no valid file for the classes c" in message(other)
    broken = tree(tmp_path / "broken", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    (broken / "train" / "a" / "1.png").write_bytes(b"not an image")
    assert f"{broken / 'train' / 'a' / '1.png'} is not an image that can be read" in message(broken)
    assert "has no complete checkpoint" in message(good, "--resume")


def test_what_bad_checkpoints_get(few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["classify", few_digits, *SMALL_IMAGES, "--epochs", 1, "--batch-size", 96]
    recipe(*run, "--output", tmp_path)
    assert "holds the checkpoints of a run: add --resume" in fails(capsys, *run, "--output", tmp_path)
    config = tmp_path / "checkpoint-1" / "config.json"
    message = fails(capsys, *run, "--output", tmp_path, "--resume", "--pool", "set")
    assert f"{config} is of another variant: pool is 'mean', this run has 'set'" in message
    config.write_text("{")
    assert f"{config} is not JSON" in fails(capsys, *run, "--output", tmp_path, "--resume")
    model = tmp_path / "model"
    data = tree(tmp_path / "data", "train/a/1.png", "val/a/1.png")
    other = ["classify", data, *SMALL_IMAGES, "--output", tmp_path / "out", "--evaluate"]
    assert "has 1 classes (a, ...), the model 10 (digit_0" in fails(capsys, *other, model)
    assert f"{data / 'config.json'} cannot be read" in fails(capsys, *other, data)
    weights = load_file(model / "model.safetensors")
    weights.pop("head.fc.bias")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "model.safetensors lacks 1 of the weights, head.fc.bias first" in fails(capsys, *other, model)
    (model / "model.safetensors").unlink()
    assert "model.safetensors is missing" in fails(capsys, *other, model)
    (model / "config.json").write_text('{"architectures": ["BertModel"]}')
    message = fails(capsys, *other, model)
    assert "must be of SeTformerForImageClassification, got ['BertModel']" in message


SMALL_SCENES = ["--model", "setformer_nano", "--classes", 3, "--head-channels", 32, "--crop-size", 64, "--cpu"]


@pytest.mark.slow
def test_scenes_are_segmented_and_the_saved_model_scores_the_same(tmp_path: Path) -> None:
    recipe("samples", "segment", tmp_path / "data")
    training = ["--epochs", 12, "--batch-size", 8, "--learning-rate", "2e-3"]
    recipe("segment", tmp_path / "data", "--output", tmp_path / "run", *SMALL_SCENES, *training)
    measured = metrics(tmp_path / "run")
    assert measured["miou"] > 0.75
    assert measured["pixel_accuracy"] > 0.9
    saved = ["--evaluate", tmp_path / "run" / "model", *SMALL_SCENES]
    recipe("segment", tmp_path / "data", "--output", tmp_path / "again", *saved)
    assert metrics(tmp_path / "again") == pytest.approx(measured)


def test_batches_of_several_gpus_are_normalised_as_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for ranks, device, kind in ((1, "cuda", nn.BatchNorm2d), (2, "cpu", nn.BatchNorm2d), (2, "cuda", nn.SyncBatchNorm)):
        processes = SimpleNamespace(num_processes=ranks, device=torch.device(device))
        converted = with_one_norm(model, processes)
        assert type(converted[1]) is kind
        assert converted.state_dict().keys() == model.state_dict().keys()


def test_mean_iou_is_that_of_the_pixels() -> None:
    classes, score = 4, MeanIou(4)
    predicted, labels = torch.randint(classes - 1, (2, 5, 6)), torch.randint(classes - 1, (2, 5, 6))
    labels[0, 0] = 255
    for n, matrix in enumerate(confusion(predicted, labels, classes)):
        got = score(transformers.EvalPrediction(matrix[None], None), compute_result=n == 1)
    p, y = predicted[labels != 255], labels[labels != 255]
    ious = [((p == c) & (y == c)).sum() / ((p == c) | (y == c)).sum() for c in range(classes - 1)]
    assert got["miou"] == pytest.approx(float(torch.stack(ious).mean()))
    assert got["pixel_accuracy"] == pytest.approx(float((p == y).double().mean()))
    assert not score.matrix.any()


def test_segmentation_starts_from_a_classifier(few_digits: Path, tmp_path: Path) -> None:
    run = ["--epochs", 1, "--batch-size", 48]
    recipe("classify", few_digits, *SMALL_IMAGES, *run, "--output", tmp_path / "classifier")
    recipe("samples", "segment", tmp_path / "data", "--size", 4)
    trained = tmp_path / "classifier" / "model"
    switches = ["--backbone", trained, "--gradient-checkpointing", "--precision", "bf16", "--learning-rate", 0]
    recipe("segment", tmp_path / "data", *SMALL_SCENES, *run, *switches, "--output", tmp_path / "run")
    want = load_file(trained / "model.safetensors")
    got = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, value in want.items():
        if name.startswith("setformer."):
            torch.testing.assert_close(got[f"backbone.{name}"], value)


def test_what_bad_scenes_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    run = ["segment", data, "--output", tmp_path / "out", *SMALL_SCENES, "--epochs", 1, "--batch-size", 2]
    assert f"{data / 'images' / 'validation'} holds no images" in fails(capsys, *run)
    write_scenes(data, 2)
    mask = data / "annotations" / "training" / "ADE_train_00000001.png"
    assert "has the class 3, the largest is 2" in fails(capsys, *run, "--classes", 2)
    assert "--classes must be from 2 to 254, got 1" in fails(capsys, *run, "--classes", 1)
    assert "model.safetensors is missing" in fails(capsys, *run, "--backbone", data)
    image = transformers.image_utils.PIL.Image
    image.new("RGB", (70, 70)).save(mask)
    assert f"{mask} must have one 8-bit number a pixel (mode L or P), got mode RGB" in fails(capsys, *run)
    image.new("L", (7, 9)).save(mask)
    assert f"{mask} and its image must have one size, got 7 × 9 and" in fails(capsys, *run)
    mask.write_bytes(b"")
    assert f"{mask} is not an image that can be read" in fails(capsys, *run)
    mask.unlink()
    assert f"{mask} is missing: the mask of" in fails(capsys, *run)


@pytest.mark.parametrize("task", TASKS)
def test_every_glue_task_runs_with_its_metrics(task: str, tmp_path: Path) -> None:
    recipe("samples", f"glue/{task}", tmp_path / "data", "--size", 30)
    recipe("glue", task, tmp_path / "data", "--output", tmp_path / "run", *SMALL_TEXT, "--epochs", 1)
    names = {
        "cola": {"matthews"},
        "stsb": {"pearson", "spearman"},
        "mrpc": {"accuracy", "f1"},
        "qqp": {"accuracy", "f1"},
    }
    wanted = names.get(task, {"accuracy"}) | {"loss"}
    if task == "mnli":
        wanted = {f"{half}_{name}" for half in ("matched", "mismatched") for name in wanted}
    assert set(metrics(tmp_path / "run")) == wanted


@pytest.mark.parametrize(
    ("task", "score", "least"),
    [("cola", "matthews", 0.9), ("mrpc", "f1", 0.9), ("stsb", "pearson", 0.8), ("mnli", "mismatched_accuracy", 0.8)],
)
def test_glue_tasks_are_learned(task: str, score: str, least: float, tmp_path: Path) -> None:
    write_glue(tmp_path / "data", task, 600)
    training = ["--epochs", 3, "--batch-size", 16, "--learning-rate", "1e-3"]
    recipe("glue", task, tmp_path / "data", "--output", tmp_path / "run", *SMALL_TEXT, *training)
    assert metrics(tmp_path / "run")[score] > least
    saved = ["--evaluate", tmp_path / "run" / "model", *SMALL_TEXT]
    recipe("glue", task, tmp_path / "data", "--output", tmp_path / "again", *saved)
    assert metrics(tmp_path / "again") == pytest.approx(metrics(tmp_path / "run"))


def test_glue_reads_the_real_layouts(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('gj04\t1\t\tThe "book" didn\'t sell.\ngj04\t0\t*\tThem read\u2028it.\n', encoding="utf-8")
    rows = read_examples(path, TASKS["cola"])
    assert [(row.sentences, row.label) for row in rows] == [
        (('The "book" didn\'t sell.',), 1),
        (("Them read\u2028it.",), 0),
    ]
    path.write_text(
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tHe "said.\tShe said.\r\n', encoding="utf-8"
    )
    assert read_examples(path, TASKS["mrpc"])[0].sentences == ('He "said.', "She said.")
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    path.write_text(f"{header}\n0\tm\tf\t2012\t1\tn\tn\tA plane.\tAn air plane.\t5.000\n")
    assert read_examples(path, TASKS["stsb"])[0].label == 5.0


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("sst2", b"sentence\nfine\n", "x.tsv:1: the header must name label; it has sentence"),
        ("sst2", b"sentence\tlabel\nfine\n", "x.tsv:2: expected at least 2 columns between tabs, got 1"),
        ("sst2", b"sentence\tlabel\nfine\t2\n", "x.tsv:2: the label must be one of 0, 1, got '2'"),
        ("sst2", b"sentence\tlabel\n", "x.tsv holds no examples"),
        ("sst2", b"", "x.tsv:1: the header must name sentence, label; it has nothing"),
        ("cola", b"a\t1\t\n", "x.tsv:1: expected at least 4 columns between tabs, got 3"),
        ("sst2", b"sentence\tlabel\n\xff\t1\n", "x.tsv is not UTF-8"),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\thigh\n", "x.tsv:2: the score must be a number, got 'high'"),
    ],
)
def test_what_bad_tsv_gets(task: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        read_examples(path, TASKS[task])
    assert message in str(raised.value)


def test_glue_from_a_pretrained_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_glue(tmp_path / "rte", "rte", 30)
    run = ["glue", "rte", tmp_path / "rte", "--output"]
    recipe(*run, tmp_path / "first", *SMALL_TEXT, "--epochs", 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "first" / "model")
    config = SeTformerTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_references=4, max_position_embeddings=40,
    )  # fmt: skip
    words = SeTformerForMaskedLM(config)
    words.save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    start = ["--pretrained", tmp_path / "words", "--cpu", "--max-length"]
    message = fails(capsys, *run, tmp_path / "second", *start, 64)
    assert "--max-length 64" in message
    assert "has 40 positions" in message
    recipe(*run, tmp_path / "second", *start, 40, "--epochs", 0.01, "--learning-rate", 0)
    saved = load_file(tmp_path / "second" / "model" / "model.safetensors")
    word = words.setformer.encoder.embeddings.word.weight
    torch.testing.assert_close(saved["setformer.encoder.embeddings.word.weight"], word.detach())
    write_glue(tmp_path / "mnli", "mnli", 30)
    other = [
        "glue",
        "mnli",
        tmp_path / "mnli",
        "--output",
        tmp_path / "third",
        "--evaluate",
        tmp_path / "second" / "model",
    ]
    message = fails(capsys, *other, "--max-length", 40)
    assert "has the classes entailment, not_entailment; mnli has entailment, neutral, contradiction" in message
    assert "holds no tokenizer" in fails(capsys, *run, tmp_path / "x", "--tokenizer", tmp_path, "--cpu")


def test_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "classify" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["glue", "--help"])
    assert done.value.code == 0
    assert "--max-length" in capsys.readouterr().out
    (tmp_path / "full").touch()
    assert "is not empty" in fails(capsys, "samples", "classify", tmp_path)
