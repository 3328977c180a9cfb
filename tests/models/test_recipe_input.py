"""What the recipes make of input at the edges: few samples, unusual or broken files, options that cannot be."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from PIL.Image import Image
from recipe_helpers import fails, metrics, recipe
from torch.utils.data import DataLoader

from setformer_kernels.models.layers import initialize_references_of
from setformer_kernels.models.transformers import SeTformerForImageClassification
from setformer_kernels.nn import reference_set
from setformer_kernels.recipes import classify, detect, segment
from setformer_kernels.recipes.coco import CocoImages
from setformer_kernels.recipes.errors import RecipeError
from setformer_kernels.recipes.glue_tasks import TASKS, read_examples
from setformer_kernels.recipes.images import read_image, read_mask
from setformer_kernels.recipes.samples import write_digits, write_scenes, write_shapes

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SMALL_IMAGES = ["--model", "setformer_nano", "--image-size", "32", "--cpu"]
IMAGE_NET = {"model": "setformer_nano", "pool": "mean", "drop_path": None}


def test_layers_with_too_few_tokens_stay_and_the_others_are_placed() -> None:
    model = classify.build(SimpleNamespace(**IMAGE_NET), ["a", "b"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    left = initialize_references_of(model, torch.randn(3, 3, 32, 64))  # 6 cells in the last stage, 24 before it
    assert left == ["setformer.backbone.stages.3.blocks.0.attention"]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert f"{left[0]}.references" not in moved
    assert "setformer.backbone.stages.2.blocks.1.attention.references" in moved
    assert model.training


class TrainedError(Exception):
    """Training would start."""


SMALL = {
    "classify": ["--model", "setformer_nano", "--image-size", "32"],
    "segment": ["--model", "setformer_nano", "--classes", 3, "--head-channels", 8, "--crop-size", 32],
    "detect": ["--model", "setformer_nano", "--min-size", 32, "--max-size", 32],
    "glue": ["--size", "tiny"],
    "lm": ["--size", "tiny", "--length", 16],
}  # fmt: skip


@pytest.mark.parametrize("kind", SMALL)
def test_what_trains_from_scratch_leaves_its_references_where_they_start(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise TrainedError

    def no_kmeans(*_: Any, **__: Any) -> None:
        raise AssertionError("k-means ran")

    monkeypatch.setattr(transformers.Trainer, "train", train)
    monkeypatch.setattr(reference_set, "spherical_kmeans", no_kmeans)
    sample = "glue/sst2" if kind == "glue" else kind
    recipe("samples", sample, tmp_path / "data", "--size", 20)
    data = ["sst2", tmp_path / "data"] if kind == "glue" else [tmp_path / "data"]
    with pytest.raises(TrainedError):
        recipe(kind, *data, *SMALL[kind], "--cpu", "--output", tmp_path / "run")


def test_a_rest_of_one_image_is_left_out_of_segmentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """UPerNet's head normalises over the batch."""
    write_scenes(tmp_path / "data", 3)
    run = ["segment", tmp_path / "data", "--model", "setformer_nano", "--classes", 3, "--head-channels", 8,
           "--crop-size", 32, "--cpu", "--epochs", 1]  # fmt: skip
    recipe(*run, "--batch-size", 2, "--output", tmp_path / "run")
    assert 0 <= metrics(tmp_path / "run")["miou"] <= 1
    message = fails(capsys, *run, "--batch-size", 1, "--output", tmp_path / "one")
    assert "training needs at least 2 images and --batch-size 2, got 3 and 1" in message


def saved(path: Path, image: Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_images_of_every_mode_are_read(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray = np.stack([ramp] * 3, -1)
    palette = PIL.Image.fromarray(ramp, "L").convert("P")
    images = {
        "gray.png": PIL.Image.fromarray(ramp), "rgb.png": PIL.Image.fromarray(gray),
        "deep.png": PIL.Image.fromarray(ramp.astype(np.uint16) * 257),
        "deep.tif": PIL.Image.fromarray(ramp.astype(np.uint16) * 257),
        "wide.tif": PIL.Image.fromarray(ramp.astype(np.int32) * 257), "palette.png": palette,
        "alpha.png": PIL.Image.fromarray(np.concatenate([gray, ramp[..., None]], -1)),
        "gray_alpha.png": PIL.Image.fromarray(np.stack([ramp, ramp], -1)),
    }  # fmt: skip
    for name, image in images.items():
        read = read_image(saved(tmp_path / name, image))
        assert read.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(read), gray, err_msg=name)
    clear = read_image(saved(tmp_path / "clear.png", palette, transparency=bytes(range(256))))
    np.testing.assert_array_equal(np.asarray(clear), gray)
    cmyk = read_image(saved(tmp_path / "cmyk.jpg", PIL.Image.new("CMYK", (9, 9), (255, 0, 0, 0))))
    assert cmyk.getpixel((4, 4))[0] < 10


def broken_files(folder: Path) -> dict[str, Path]:
    png, jpg, tif, gif, bmp = (saved(folder / f"good.{kind}", PIL.Image.new("RGB", (40, 40), "red")).read_bytes()
                               for kind in ("png", "jpg", "tif", "gif", "bmp"))  # fmt: skip
    size = struct.pack(">II", 60_000, 60_000)
    contents = {
        "empty.png": b"", "text.png": b"no image", "cut.png": png[:60], "cut.jpg": jpg[: len(jpg) // 2],
        "cut.gif": gif[:20], "cut.tif": tif[:-60], "cut.bmp": bmp[:70], "flipped.png": png[:41] + b"\0" + png[42:],
        "huge.png": png[:16] + size + png[24:], "chunk.png": png[:33] + b"\xff" * 8 + png[33:],
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    deep = PIL.Image.fromarray(np.full((4, 4), 1 << 20, np.int32))
    floats = PIL.Image.fromarray(np.zeros((4, 4), np.float32))
    others = {"deep.tif": saved(folder / "deep.tif", deep), "floats.tif": saved(folder / "floats.tif", floats)}
    return {**{name: folder / name for name in (*contents, "folder.png")}, **others}


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path in broken_files(tmp_path).values():
        with pytest.raises(RecipeError) as raised:
            read_image(path)
        assert str(raised.value).startswith(f"{path} is not an image that can be read: "), path
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [ValueError, SyntaxError, struct.error, KeyError, EOFError, MemoryError])
def test_whatever_a_decoder_raises_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Image) -> None:
        raise error("why")

    path = saved(tmp_path / "x.png", PIL.Image.new("L", (4, 4)))
    monkeypatch.setattr(PIL.Image.Image, "load", load)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", load)
    for read in (read_image, read_mask):
        with pytest.raises(RecipeError, match=f"{path} is not an image that can be read: .?why"):
            read(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [900, 90])  # where Pillow warns, and where it raises
def test_images_above_pillows_limit_are_named_by_every_recipe(
    pixels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "large.png", PIL.Image.new("L", (40, 40)))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", pixels)
    labelled = classify.LabelledImages([(str(path), 0)], classify.evaluation_transform(32), 0)
    scenes = segment.WholeImages([(path, path)], 3, 0)
    write_shapes(tmp_path / "shapes", 1)
    shapes = CocoImages(tmp_path / "shapes" / "train2017",
                        tmp_path / "shapes" / "annotations" / "instances_train2017.json", 0, True)  # fmt: skip
    for samples, name in ((labelled, path), (scenes, path), (shapes, shapes.folder / "000000000001.jpg")):
        with pytest.raises(RecipeError, match=rf"{name} is not an image that can be read: .* pixels.* limit of \d+"):
            samples[0]


def test_what_stops_a_loading_process_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    samples = classify.LabelledImages([(str(tmp_path / "x.png"), 0)], classify.evaluation_transform(32), 0)
    batches = iter(DataLoader(samples, num_workers=1))
    with pytest.raises(RecipeError) as raised:
        next(batches)
    batches._shutdown_workers()  # the garbage collector would take 5 seconds for it
    assert str(raised.value).startswith(f"{tmp_path / 'x.png'} is not an image that can be read: ")
    assert "\n" not in str(raised.value)


def test_broken_lines_of_qqp_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.tsv"
    header, good = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{0}\t1\t2\tHow is it {0}?\tIs it {0}?\t1"
    halves = ["7\t1\t2\tHow\tIs it", "that?\t0", ""]  # a line break in a question
    path.write_text("\n".join([header, good.format(0), *halves, good.format(1)]) + "\n")
    assert [row.sentences[1] for row in read_examples(path, TASKS["qqp"])] == ["Is it 0?", "Is it 1?"]
    assert f"{path}: lines left out, with fewer than 6 columns: 3 (3, 4, 5)" in capsys.readouterr().err
    path.write_text("\n".join([header, *["that?\t0"] * 9]) + "\n")
    with pytest.raises(RecipeError, match="holds no examples"):
        read_examples(path, TASKS["qqp"])
    assert "fewer than 6 columns: 9 (2, 3, 4, 5, 6, ...)" in capsys.readouterr().err
    path.write_text("\n".join([header, "7\t1\t2\tHow\tIs it\tmaybe"]) + "\n")
    with pytest.raises(RecipeError, match=r"train.tsv:2: the label must be one of 0, 1, got 'maybe'"):
        read_examples(path, TASKS["qqp"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", 0, "--epochs must be > 0, got 0.0"), ("--epochs", "nan", "--epochs must be > 0, got nan"),
        ("--batch-size", 0, "--batch-size must be ≥ 1, got 0"), ("--accumulate", 0, "--accumulate must be ≥ 1, got 0"),
        ("--learning-rate", -1, "--learning-rate must be ≥ 0, got -1.0"), ("--workers", -1, "--workers must be ≥ 0"),
        ("--learning-rate", "inf", "--learning-rate must be ≥ 0, got inf"), ("--seed", -1, "--seed must be from 0 to"),
        ("--warmup", 5, "--warmup must be from 0 to 0.99, got 5.0"), ("--save-every", -1, "--save-every must be ≥ 0"),
        ("--min-scale", 2, "--min-scale must be from 0 to 1, got 2.0"), ("--drop-path", 1, "--drop-path must be from"),
        ("--label-smoothing", -1, "--label-smoothing must be from 0 to 1"),
        ("--output", "README.md/run", "--output must be a folder, got README.md/run"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(
    option: str, value: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["classify", tmp_path, *SMALL_IMAGES, "--output", tmp_path / "out"]
    assert message in fails(capsys, *run, option, value)


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("glue", ["--references", 0], "--references must be ≥ 1, got 0"),
        ("glue", ["--max-length", 3], "--max-length must be ≥ 4, got 3"),
        ("glue", ["--vocabulary", 2], "--vocabulary must be ≥ 6, got 2"),
        ("segment", ["--head-channels", 0], "--head-channels must be ≥ 1, got 0"),
        ("detect", ["--anchor-scale", 0], "--anchor-scale must be ≥ 1, got 0"),
    ],
)
def test_own_options_that_cannot_be(
    command: str, option: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["rte"] if command == "glue" else []
    run = [command, *task, tmp_path, "--output", tmp_path / "out", "--cpu"]
    assert message in fails(capsys, *run, *option)


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    run = ["--output", tmp_path / "out", "--cpu"]
    message = fails(capsys, "classify", tmp_path / "file", *run)
    assert f"{tmp_path / 'file' / 'val'} must hold one folder of images for each class" in message
    assert f"{tmp_path / 'file'} is not a folder" in fails(capsys, "samples", "classify", tmp_path / "file")
    assert "--size must be ≥ 1, got 0" in fails(capsys, "samples", "detect", tmp_path / "new", "--size", 0)
    assert f"{tmp_path / 'file' / 'dev.tsv'} cannot be read" in fails(capsys, "glue", "rte", tmp_path / "file", *run)
    for name in ("train/a/1.png", "val/a/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        saved(tmp_path / name, PIL.Image.new("RGB", (40, 40)))
    message = fails(capsys, "classify", tmp_path, *SMALL_IMAGES, "--output", tmp_path / "out")
    assert f"{tmp_path / 'train'} must have at least 2 classes, got a alone" in message


def test_weights_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digits(tmp_path / "data", 4)
    model = classify.build(SimpleNamespace(**IMAGE_NET), [f"digit_{i}" for i in range(10)])
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    run = ["classify", tmp_path / "data", *SMALL_IMAGES, "--output", tmp_path / "out", "--evaluate", tmp_path / "model"]
    assert f"{weights} cannot be loaded: " in fails(capsys, *run)
    with pytest.raises(RecipeError, match=f"{weights} cannot be loaded: "):
        segment.load_backbone(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[]")
    assert "config.json must hold a JSON object, got a list" in fails(capsys, *run)
    other = detect.build(SimpleNamespace(backbone=None, min_size=32, max_size=32, anchor_scale=4, proposals=4,
                                         head_width=8, channels=8, model="setformer_nano"), ["a"])  # fmt: skip
    other.save_pretrained(tmp_path / "detector")
    with pytest.raises(RecipeError, match=r"model.safetensors lacks \d+ of the weights, setformer"):
        segment.load_backbone(tmp_path / "detector")
    assert SeTformerForImageClassification.config_class.model_type == "setformer"
