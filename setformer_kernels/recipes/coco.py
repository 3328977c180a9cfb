"""Instances in COCO's format: reading, checking, and scoring with pycocotools."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from .errors import RecipeError
from .images import Augmented, read_image
from .training import read_json

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "annotations": {
        "id": int, "image_id": int, "category_id": int, "bbox": list, "segmentation": (list, dict), "iscrowd": int,
        "area": (int, float),
    },
    "categories": {"id": int, "name": str},
}  # fmt: skip
REFERRED = {"image_id": "images", "category_id": "categories"}  # by annotations


def read_coco(path: Path) -> COCO:
    """The annotations of an instances_*.json that has what it must have."""
    content = read_json(path)
    for name in FIELDS:
        rows = content.get(name)
        if not isinstance(rows, list) or (name != "annotations" and not rows):
            raise RecipeError(f"{path} must have a list {name!r}")
        check_rows(path, name, rows)
    known = {field: {row["id"] for row in content[name]} for field, name in REFERRED.items()}
    for row in content["annotations"]:
        for field, ids in known.items():
            if row[field] not in ids:
                raise RecipeError(f"{path}: annotation {row['id']} has the unknown {field} {row[field]}")
        if len(row["bbox"]) != 4 or not all(isinstance(value, (int, float)) for value in row["bbox"]):
            raise RecipeError(f"{path}: annotation {row['id']} must have a bbox of 4 numbers, got {row['bbox']}")
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def check_rows(path: Path, name: str, rows: list[Any]) -> None:
    """Every row has the fields of its kind, and an id of its own."""
    ids = set()
    for row in rows:
        for field, kind in FIELDS[name].items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                raise RecipeError(f"{path}: an entry of {name!r} must have {field} ({wanted}), got {str(row)[:80]}")
        if row["id"] in ids:
            raise RecipeError(f"{path}: two entries of {name!r} have the id {row['id']}")
        ids.add(row["id"])


def category_names(coco: COCO) -> list[str]:
    """In the order of their ids: label i of the model is the i-th, from 1 (0 is the background)."""
    return [coco.cats[number]["name"] for number in sorted(coco.cats)]


class CocoImages(Augmented):
    """Images [3, h, w] with boxes [n, 4] (x, y, x', y'), labels [n] from 1 and masks [n, h, w].

    Crowds take no part.  In training neither do images without an instance, and half are mirrored.
    """

    def __init__(self, folder: Path, annotations: Path, seed: int, training: bool) -> None:
        super().__init__(seed)
        self.folder, self.annotations, self.training = folder, annotations, training
        self.coco = read_coco(annotations)
        self.labels = {number: i + 1 for i, number in enumerate(sorted(self.coco.cats))}
        self.ids = [n for n in sorted(self.coco.imgs) if not training or self.instances(n)]
        if not self.ids:
            raise RecipeError(f"{annotations} has no image with an instance")
        if not folder.is_dir():
            raise RecipeError(f"{folder} must be the folder of the images of {annotations}")

    def instances(self, image_id: int) -> list[dict[str, Any]]:
        """The annotations that are no crowds and a pixel wide and high at least."""
        return [row for row in self.coco.imgToAnns[image_id] if not row["iscrowd"] and min(row["bbox"][2:]) >= 1]

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        number = self.ids[index]
        row = self.coco.imgs[number]
        path = self.folder / row["file_name"]
        image = read_image(path)
        if image.size != (row["width"], row["height"]):
            sizes = f"{row['width']} × {row['height']} in {self.annotations}, {image.size[0]} × {image.size[1]} on disk"
            raise RecipeError(f"{path} must have one size, got {sizes}")
        masks = {r["id"]: self.mask(r, row) for r in self.coco.imgToAnns[number]}  # of crowds too: a check
        rows = self.instances(number)
        boxes = torch.tensor([r["bbox"] for r in rows], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        none = np.zeros((0, row["height"], row["width"]), np.uint8)
        return image, {
            "boxes": boxes,
            "labels": torch.tensor([self.labels[r["category_id"]] for r in rows], dtype=torch.int64),
            "masks": torch.from_numpy(np.stack([masks[r["id"]] for r in rows]) if rows else none),
            "image_id": torch.tensor(number),
        }

    def mask(self, row: dict[str, Any], image: dict[str, Any]) -> np.ndarray:
        """[h, w] of 0 and 1: the polygons or the run lengths of an annotation."""
        broken = f"{self.annotations}: annotation {row['id']} has a broken segmentation"
        try:
            mask = self.coco.annToMask(row)
        except Exception as error:  # pycocotools raises whatever its C code meets
            raise RecipeError(f"{broken}: {error!r}") from error
        if mask.shape != (image["height"], image["width"]):
            raise RecipeError(f"{broken}: {mask.shape[1]} × {mask.shape[0]}, its image is {image['width']} ×"
                              f" {image['height']}")  # fmt: skip
        return mask

    def transform(self, loaded: tuple[Image.Image, dict[str, Tensor]]) -> dict[str, Any]:
        image, target = TF.to_dtype(TF.pil_to_tensor(loaded[0]), torch.float32, scale=True), dict(loaded[1])
        if self.training and torch.rand(()) < 0.5:
            image, target["masks"] = image.flip(-1), target["masks"].flip(-1)
            left, top, right, bottom = target["boxes"].unbind(1)
            target["boxes"] = torch.stack([image.shape[-1] - right, top, image.shape[-1] - left, bottom], 1)
        return {"pixel_values": image, "targets": target}


def results_of(found: dict[str, Tensor], image_id: int, coco: COCO) -> list[dict[str, Any]]:
    """Boxes [n, 4], labels [n], scores [n] and masks [n, 1, h, w] found in an image, in COCO's result format."""
    numbers = sorted(coco.cats)
    boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1)
    masks = (found["masks"][:, 0] > 0.5).permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    encoded = rle.encode(np.asfortranarray(masks)) if len(boxes) else []
    columns = (boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), encoded)
    return [
        {"image_id": image_id, "category_id": numbers[label - 1], "score": score, "bbox": box, "segmentation": mask}
        for box, label, score, mask in zip(*columns, strict=True)
    ]


def average_precision(coco: COCO, results: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's mean average precision (IoU 0.5 to 0.95), and at 0.5, of boxes and of masks.

    0 if nothing is found; -1, as pycocotools has it, if there is nothing to find.
    """
    scores = dict.fromkeys(("map", "map50", "mask_map", "mask_map50"), 0.0)
    if not results:
        return scores
    with contextlib.redirect_stdout(io.StringIO()):
        for prefix, kind in (("", "bbox"), ("mask_", "segm")):
            # loadRes writes into its rows, and makes boxes of masks only where there are none.
            rows = [{k: v for k, v in row.items() if kind == "bbox" or k != "bbox"} for row in results]
            scored = COCOeval(coco, coco.loadRes(rows), kind)
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
            scores[f"{prefix}map"], scores[f"{prefix}map50"] = (float(value) for value in scored.stats[:2])
    return scores
