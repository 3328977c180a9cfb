"""The recipes on small data sets in the real formats: learned scores, exact resuming, and what bad input gets."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from setformer_kernels.models.transformers import SeTformerForMaskedLM, SeTformerTextConfig
from setformer_kernels.recipes.__main__ import main
from setformer_kernels.recipes.coco import CocoImages, average_precision, results_of
from setformer_kernels.recipes.errors import RecipeError
from setformer_kernels.recipes.glue_tasks import TASKS, read_examples
from setformer_kernels.recipes.samples import write_digits, write_glue, write_scenes, write_shapes
from setformer_kernels.recipes.segment import MeanIou, confusion

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
SMALL_IMAGES = ["--model", "setformer_nano", "--image-size", "32", "--no-flip", "--cpu"]
SMALL_TEXT = ["--size", "tiny", "--references", "8", "--max-length", "48", "--cpu"]


def recipe(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a recipe that refuses its input."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def metrics(output: Path) -> dict[str, float]:
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    write_digits(folder, 96)
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
    broken = tree(tmp_path / "broken", "train/a/1.png", "val/a/1.png")
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
    run = ["segment", data, "--output", tmp_path / "out", *SMALL_SCENES, "--epochs", 1]
    assert f"{data / 'images' / 'validation'} holds no images" in fails(capsys, *run)
    write_scenes(data, 1)
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


SMALL_SHAPES = ["--model", "setformer_nano", "--min-size", 64, "--max-size", 64, "--anchor-scale", 6,
                "--proposals", 32, "--channels", 32, "--head-width", 128, "--batch-size", 8, "--cpu"]  # fmt: skip


@pytest.mark.slow
def test_shapes_are_detected_and_the_saved_model_scores_the_same(tmp_path: Path) -> None:
    recipe("samples", "detect", tmp_path / "data")
    training = ["--epochs", 4, "--learning-rate", "1e-3"]
    recipe("detect", tmp_path / "data", "--output", tmp_path / "run", *SMALL_SHAPES, *training)
    measured = metrics(tmp_path / "run")
    assert measured["map"] > 0.5
    assert measured["map50"] > 0.9
    assert measured["mask_map"] > 0.5
    assert measured["mask_map50"] > 0.9
    assert (tmp_path / "run" / "curve.csv").read_text().count(",eval_map50,") == 5  # four epochs, and the end
    saved = ["--evaluate", tmp_path / "run" / "model", *SMALL_SHAPES]
    recipe("detect", tmp_path / "data", "--output", tmp_path / "again", *saved)
    assert metrics(tmp_path / "again") == pytest.approx(measured)


def test_detection_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """With everything random there is: mirrors, the sampling of anchors and proposals, stochastic depth."""
    write_shapes(tmp_path / "data", 16)
    run = ["detect", tmp_path / "data", *SMALL_SHAPES, "--epochs", 2, "--precision", "bf16", "--gradient-checkpointing"]
    recipe(*run, "--output", tmp_path / "whole")
    want = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for later in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "whole" / later)
    recipe(*run, "--output", tmp_path / "whole", "--resume")
    for name, value in load_file(tmp_path / "whole" / "model" / "model.safetensors").items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0, msg=name)


def test_detection_starts_from_a_classifier(few_digits: Path, tmp_path: Path) -> None:
    run = ["--epochs", 1, "--batch-size", 48]
    recipe("classify", few_digits, *SMALL_IMAGES, *run, "--output", tmp_path / "classifier")
    write_shapes(tmp_path / "data", 4)
    trained = tmp_path / "classifier" / "model"
    start = ["--backbone", trained, *SMALL_SHAPES, *run, "--learning-rate", 0]
    recipe("detect", tmp_path / "data", *start, "--output", tmp_path / "run")
    got = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, value in load_file(trained / "model.safetensors").items():
        if name.startswith("setformer."):
            torch.testing.assert_close(got[f"detector.backbone.body.{name}"], value)


def shapes(folder: Path, size: int = 4, training: bool = False) -> CocoImages:
    """The training images of write_shapes."""
    write_shapes(folder, size)
    annotations = folder / "annotations" / "instances_train2017.json"
    return CocoImages(folder / "train2017", annotations, seed=0, training=training)


def test_detection_targets_are_what_the_pictures_show(tmp_path: Path) -> None:
    """Discs have no red, squares no green: the pictures say where they are."""
    for sample in shapes(tmp_path):
        image, target = sample["pixel_values"], sample["targets"]
        assert sorted(target["labels"].tolist()) == [1, 2]
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            lit = (image[2] > 0.4) & (image[label - 1] < 0.4)  # blue and no red, or no green
            assert ((mask > 0) & lit).sum() > 0.9 * ((mask > 0) | lit).sum()
            rows, columns = torch.where(mask > 0)
            drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            torch.testing.assert_close(box, torch.stack(drawn).float(), rtol=0, atol=1)


def test_half_of_the_training_images_are_mirrored_with_their_targets(tmp_path: Path) -> None:
    still = shapes(tmp_path / "a", 16)
    mirrored = 0
    for want, got in zip(still, shapes(tmp_path / "b", 16, training=True), strict=True):
        if torch.equal(got["pixel_values"], want["pixel_values"]):
            torch.testing.assert_close(got["targets"], want["targets"])
            continue
        mirrored += 1
        torch.testing.assert_close(got["pixel_values"], want["pixel_values"].flip(-1))
        torch.testing.assert_close(got["targets"]["masks"], want["targets"]["masks"].flip(-1))
        boxes = torch.tensor([[64 - x1, y0, 64 - x0, y1] for x0, y0, x1, y1 in want["targets"]["boxes"].tolist()])
        torch.testing.assert_close(got["targets"]["boxes"], boxes)
    assert 3 <= mirrored <= 13


def crowded(content: dict[str, Any]) -> None:
    """The first annotation becomes a crowd, as run lengths."""
    runs = {"size": [64, 64], "counts": [0, 1000, 3096]}
    content["annotations"][0].update(iscrowd=1, segmentation=runs)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_crowds_and_empty_images_are_left_out(tmp_path: Path) -> None:
    data = shapes(tmp_path, training=True)
    rewrite(data.annotations, crowded)
    rewrite(data.annotations, lambda content: content["annotations"].__delitem__(slice(2, 4)))
    again = CocoImages(data.folder, data.annotations, seed=0, training=True)
    assert again.ids == [1, 3, 4]
    assert again[0]["targets"]["masks"].shape == (1, 64, 64)
    empty = CocoImages(data.folder, data.annotations, seed=0, training=False)[1]["targets"]
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 64, 64)


def scored(data: CocoImages, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> dict[str, float]:
    """Average precision of what is there, changed by a rule."""
    rows = []
    for sample in data:
        target = sample["targets"]
        found = change({**target, "masks": target["masks"][:, None].float(), "scores": torch.ones(2)})
        rows += results_of(found, int(target["image_id"]), data.coco)
    return average_precision(data.coco, rows)


def test_average_precision(tmp_path: Path) -> None:
    data = shapes(tmp_path)
    names = ("map", "map50", "mask_map", "mask_map50")
    assert scored(data, lambda found: found) == pytest.approx(dict.fromkeys(names, 1.0))
    shifted = scored(
        data, lambda found: {**found, "boxes": found["boxes"] + 3, "masks": found["masks"].roll((3, 3), (2, 3))}
    )
    for kind in ("", "mask_"):
        assert 0 < shifted[f"{kind}map"] < 0.6  # an IoU of 0.6 or so passes few of the ten thresholds
        assert shifted[f"{kind}map50"] == pytest.approx(1)
    assert scored(data, lambda found: {**found, "labels": 3 - found["labels"]}) == pytest.approx(
        dict.fromkeys(names, 0.0)
    )
    assert average_precision(data.coco, []) == dict.fromkeys(names, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "must have a list 'images'"),
        (lambda content: content["annotations"][1].pop("bbox"), "an entry of 'annotations' must have bbox (list), got"),
        (
            lambda content: content["annotations"][1].update(bbox="wide"),
            "an entry of 'annotations' must have bbox (list), got",
        ),
        (lambda content: content["annotations"][1].update(bbox=[1, 2]), "annotation 2 must have a bbox of 4 numbers"),
        (lambda content: content["categories"].append("cat"), "an entry of 'categories' must have id (int), got cat"),
        (lambda content: content["images"][1].update(id=1), "two entries of 'images' have the id 1"),
        (lambda content: content["annotations"][1].update(image_id=99), "annotation 2 has the unknown image_id 99"),
        (lambda content: content["annotations"][1].update(category_id=5), "annotation 2 has the unknown category_id 5"),
        (lambda content: content["annotations"].clear(), "has no image with an instance"),
    ],
)
def test_what_bad_coco_files_get(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:  # fmt: skip
    data = shapes(tmp_path)
    rewrite(data.annotations, change)
    with pytest.raises(RecipeError) as raised:
        CocoImages(data.folder, data.annotations, seed=0, training=True)
    assert str(raised.value).startswith(str(data.annotations))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        [[]],
        [["a", "b", "c", "d", "e", "f"]],
        {},
        {"size": [9, 9], "counts": [81]},
        {"size": [64, 64], "counts": "!"},
    ],
)
def test_what_broken_segmentations_get(segmentation: object, tmp_path: Path) -> None:
    data = shapes(tmp_path)
    for crowd in (0, 1):
        rewrite(data.annotations, lambda content, crowd=crowd: content["annotations"][0].update(
            iscrowd=crowd, segmentation=segmentation
        ))  # fmt: skip
        with pytest.raises(RecipeError) as raised:
            CocoImages(data.folder, data.annotations, seed=0, training=False)[0]
        assert f"{data.annotations}: annotation 1 has a broken segmentation" in str(raised.value)


def test_what_bad_detection_data_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    run = ["detect", data, "--output", tmp_path / "out", *SMALL_SHAPES, "--epochs", 1]
    annotations = {split: data / "annotations" / f"instances_{split}.json" for split in ("train2017", "val2017")}
    assert f"{annotations['val2017']} cannot be read: No such file" in fails(capsys, *run)
    write_shapes(data, 4)
    assert "--min-size must be from 32 to --max-size 64, got 16" in fails(capsys, *run, "--min-size", 16)
    assert "--proposals must be ≥ 1, got 0" in fails(capsys, *run, "--proposals", 0)
    assert "model.safetensors is missing" in fails(capsys, *run, "--backbone", data)
    image = data / "train2017" / "000000000001.jpg"
    transformers.image_utils.PIL.Image.new("RGB", (70, 60)).save(image)
    message = fails(capsys, *run)
    assert f"{image} must have one size, got 64 × 64 in {annotations['train2017']}, 70 × 60 on disk" in message
    image.unlink()
    assert f"{image} does not exist" in fails(capsys, *run)
    (data / "val2017").rename(data / "elsewhere")
    assert f"{data / 'val2017'} must be the folder of the images of" in fails(capsys, *run)
    (data / "elsewhere").rename(data / "val2017")
    rewrite(annotations["train2017"], lambda content: content["categories"][0].update(name="ring"))
    assert f"{annotations['train2017']} and {annotations['val2017']} must have the same" in fails(capsys, *run)
    annotations["train2017"].write_bytes(b"\xff{")
    assert f"{annotations['train2017']} is not JSON" in fails(capsys, *run)


def test_what_another_models_categories_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shapes(tmp_path / "data", 4)
    run = ["detect", tmp_path / "data", *SMALL_SHAPES]
    recipe(*run, "--output", tmp_path / "run", "--epochs", 1)
    message = fails(capsys, *run, "--output", tmp_path / "run", "--resume", "--channels", 16)
    assert "is of another variant: channels is 32, this run has 16" in message
    held_out = tmp_path / "data" / "annotations" / "instances_val2017.json"
    rewrite(held_out, lambda content: content["categories"].append({"id": 11, "name": "star"}))
    message = fails(capsys, *run, "--output", tmp_path / "out", "--evaluate", tmp_path / "run" / "model")
    assert f"{held_out} has 3 categories (disc, square, star, ...)" in message
    assert "2 (disc, square, ...): they must be the same" in message


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
