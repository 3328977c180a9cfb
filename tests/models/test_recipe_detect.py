"""The detection recipe: COCO's format, targets, scores, learning and resuming, and what bad input gets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recipe_helpers import fails, metrics, recipe
from safetensors.torch import load_file

from setformer_kernels.recipes.coco import CocoImages, average_precision, results_of
from setformer_kernels.recipes.errors import RecipeError
from setformer_kernels.recipes.samples import write_shapes

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SMALL_IMAGES = ["--model", "setformer_nano", "--image-size", "32", "--no-flip", "--cpu"]
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
