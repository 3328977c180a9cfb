"""The benchmark of conversion on images, on a model that takes seconds."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from benchmarks.common.hardware import ROOT
from benchmarks.quality import pictures, transfer_images, transfer_table


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two sources of noise, red and blue, which are also two classes; a tiny encoder."""
    draw = torch.Generator().manual_seed(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            x = torch.randint(100, (30, 40 if i % 2 else 20, 3), generator=draw, dtype=torch.uint8)
            x[..., channel] += 150
            Image.fromarray(x.numpy()).save(tmp_path / "images" / name / f"{i}.png")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "encoder")
    images = ["--images", str(tmp_path / "images"), "--labelled", str(tmp_path / "images"), "--size", "28"]
    return ["--encoder", str(tmp_path / "encoder"), *images]


def test_rows_of_a_transfer_on_images(folders: list[str], tmp_path: Path) -> None:
    run = [*folders, "--steps", "4", "--tune-steps", "2", "--out", str(tmp_path), "--name", "x"]
    run += ["--batch-size", "8", "--samples", "24", "--measured", "16", "--references", "4"]
    run += ["--work", str(tmp_path / "work"), "--recording", str(tmp_path / "answers")]
    for relaxation in ("1", "0.5"):
        assert transfer_images.main([*run, "--key-relaxation", relaxation]) == 0
    assert transfer_images.main([*run, "--original"]) == 0
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    for relaxation in ("1.0", "0.5"):
        own = [row for row in rows if row["key_relaxation"] == relaxation]
        found = {(row["moment"], row["name"]): float(row["value"]) for row in own}
        assert len(found) == len(own)
        returned = "tuned" if found["tuned", "error"] <= found["matched", "error"] else "matched"
        assert found[returned, "probe_accuracy of images, seed 2"] > 0.9
        assert found["matched", "cosine"] != found["placed", "cosine"] != found["tuned", "cosine"]
        assert sum(name.startswith("error of") for _, name in found) == 2 * 2 * 4
    assert {row["moment"] for row in rows if row["references"] == ""} == {"original", "random"}
    told = json.loads((tmp_path / "x.json").read_text())
    assert told.keys() == {"M 4, T 1, key_relaxation 1.0, seed 0", "M 4, T 1, key_relaxation 0.5, seed 0", "original"}
    conditions = told["original"]
    assert conditions["train_files"] == {"blue": 10, "red": 10}
    assert conditions["labelled_images"] == {"images": 24}
    assert str(tmp_path) not in (tmp_path / "x.json").read_text()


def test_crops_are_squares_of_their_images_and_no_held_out_file_is_learned_from(tmp_path: Path) -> None:
    rows = torch.arange(40, dtype=torch.uint8)[:, None, None].expand(40, 60, 3)
    for i in range(20):
        Image.fromarray(rows.contiguous().numpy()).save(tmp_path / f"{i:02d}.png")
    train, test = pictures.sources(tmp_path)
    assert len(train[tmp_path.name]) == 18
    assert not {*train[tmp_path.name]} & {*test[tmp_path.name]}
    asked = pictures.drawn(train, 6, seed=0)
    assert asked == pictures.drawn(train, 6, seed=0) != pictures.drawn(train, 6, seed=1)
    for crop, x in zip(asked, pictures.crops(asked, 14), strict=True):
        side, top = round(crop.side * 40), round(crop.top * (40 - round(crop.side * 40)))
        assert x.shape == (3, 14, 14)
        assert abs(int(x.min()) - top) <= 2
        assert abs(int(x.max()) - (top + side - 1)) <= 2
    columns = rows.transpose(0, 1).contiguous().numpy()
    Image.fromarray(columns).save(tmp_path / "00.png")
    mirrored, plain = (asked[0]._replace(path=tmp_path / "00.png", mirrored=how) for how in (True, False))
    one, other = pictures.crops([mirrored, plain], 14)
    assert torch.equal(one, other.flip(-1))
    assert not torch.equal(one, other)


def test_what_is_transparent_is_white_and_images_lie_in_a_white_square(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0, 0))
    image.save(tmp_path / "x.png")
    x = pictures.whole(tmp_path / "x.png", 8)
    assert x[:, 0].eq(255).all()
    assert x[:, 2, 0].tolist() == [255, 255, 255]
    assert x[:, 4, 4].tolist() == [255, 0, 0]
    assert torch.allclose(pictures.collate([x])["pixel_values"][0, 0, 0, 0], torch.tensor((1 - 0.485) / 0.229))


def test_folders_without_images_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a folder of 10 images"):
        pictures.sources(tmp_path)
    with pytest.raises(ValueError, match="named by class"):
        pictures.labelled(tmp_path, 8)


def test_the_page_shows_every_line_of_the_results() -> None:
    page = (ROOT / "docs" / "converting.md").read_text()
    (name,) = set(re.findall(r"benchmarks/results/(transfer_images_\S+?\.csv)", page))
    lines = transfer_table.rendered(*transfer_table.read(ROOT / "benchmarks" / "results" / name))
    assert [line for line in lines if not line.startswith(lines[0][:6]) and line not in page] == []
