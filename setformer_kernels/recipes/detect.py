"""Object detection and instance segmentation in COCO's format, with Mask R-CNN: FOLDER/train2017/*.jpg,
FOLDER/val2017/*.jpg, FOLDER/annotations/instances_train2017.json and instances_val2017.json."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset
from transformers import set_seed

from ..models import VISION_SIZES
from ..models.transformers import SeTformerConfig
from .arguments import add_training_arguments, check_range, check_training_arguments
from .coco import CocoImages, average_precision, category_names, results_of
from .errors import RecipeError
from .mask_rcnn import SeTformerMaskRcnn
from .segment import STAGES, load_backbone
from .training import Job, RecipeTrainer, execute, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="FOLDER")
    parser.add_argument("--model", choices=VISION_SIZES, default="setformer_tiny", help="of a new backbone")
    parser.add_argument("--backbone", type=Path, metavar="MODEL", help="a saved SeTformer for images to start from")
    parser.add_argument("--min-size", type=int, default=800, help="shorter side that images are scaled to")
    parser.add_argument("--max-size", type=int, default=1333, help="most that the longer side may have")
    parser.add_argument("--anchor-scale", type=int, default=8, help="side of an anchor / stride of its map")
    parser.add_argument("--proposals", type=int, default=1000, help="boxes of an image that the second stage sees")
    parser.add_argument("--channels", type=int, default=256, help="of the feature pyramid and the mask head")
    parser.add_argument("--head-width", type=int, default=1024, help="of the box head")
    add_training_arguments(parser, epochs=12, batch_size=2, learning_rate=1e-4)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Mean average precision of boxes and masks on val2017."""
    check_arguments(args)
    set_seed(args.seed)
    held_out = split_of(args, "val2017", training=False)
    names = category_names(held_out.coco)
    train = None if args.evaluate else split_of(args, "train2017", training=True)
    if train is not None and category_names(train.coco) != names:
        raise RecipeError(f"{train.annotations} and {held_out.annotations} must have the same categories")
    model = load_model(SeTformerMaskRcnn, args.evaluate) if args.evaluate else build(args, names)
    known = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if known != names:
        raise RecipeError(
            f"{held_out.annotations} has {len(names)} categories ({', '.join(names[:3])}, ...), {args.evaluate}"
            f" {len(known)} ({', '.join(known[:3])}, ...): they must be the same"
        )
    return execute(args, Job(model, train, {"": held_out}, collate, None, trainer=DetectionTrainer))


def check_arguments(args: argparse.Namespace) -> None:
    check_training_arguments(args)
    if not 32 <= args.min_size <= args.max_size:
        raise RecipeError(f"--min-size must be from 32 to --max-size {args.max_size}, got {args.min_size}")
    for name in ("anchor_scale", "proposals", "channels", "head_width"):
        check_range(args, name, 1)


def split_of(args: argparse.Namespace, split: str, training: bool) -> CocoImages:
    return CocoImages(args.data / split, args.data / "annotations" / f"instances_{split}.json", args.seed, training)


def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Lists: images have sizes of their own."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def build(args: argparse.Namespace, names: list[str]) -> SeTformerMaskRcnn:
    own = {
        "min_size": args.min_size, "max_size": args.max_size, "anchor_scale": args.anchor_scale,
        "proposals": args.proposals, "head_width": args.head_width, "channels": args.channels,
        "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)},
    }  # fmt: skip
    if not args.backbone:
        return SeTformerMaskRcnn(SeTformerConfig.from_size(args.model, out_features=STAGES, **own))
    backbone = load_backbone(args.backbone)
    for name, value in own.items():
        setattr(backbone.config, name, value)
    model = SeTformerMaskRcnn(backbone.config)
    model.detector.backbone.body.load_state_dict(backbone.state_dict())
    return model


class DetectionTrainer(RecipeTrainer):
    """Evaluation by pycocotools on what all processes found."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: transformers' rule is for batches that are one tensor."""
        return 0

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:  # fmt: skip
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, CocoImages)
        # by image: where processes share them, the last batch repeats some to be even
        found = dict(gather_object(self.detect(dataset)))
        rows = [row for results in found.values() for row in results]
        measured = average_precision(dataset.coco, rows)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def detect(self, dataset: CocoImages) -> list[tuple[int, list[dict[str, Any]]]]:
        """(image id, results) of this process's share of the images."""
        model, found = self.model.eval().to(self.args.device), []
        for inputs in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(inputs)
            ids = [int(target["image_id"]) for target in inputs["targets"]]
            with self.accelerator.autocast():
                detections: list[dict[str, Tensor]] = model(inputs["pixel_values"])
            for image_id, detection in zip(ids, detections, strict=True):
                found.append((image_id, results_of(detection, image_id, dataset.coco)))
        return found
