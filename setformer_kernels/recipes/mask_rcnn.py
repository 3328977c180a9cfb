"""torchvision's Mask R-CNN on a SeTformer backbone, saved and loaded as transformers' models are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..models.transformers import SeTformerBackbone, SeTformerConfig
from ..models.transformers.initialization import SeTPreTrainedModel
from .images import MEAN, STD

PYRAMID_STRIDES = (4, 8, 16, 32, 64)


class PyramidBackbone(nn.Module):
    """Images [B, 3, h, w] -> five maps of config.channels channels at PYRAMID_STRIDES, by name."""

    def __init__(self, config: SeTformerConfig) -> None:
        super().__init__()
        self.body = SeTformerBackbone(config)
        self.fpn = FeaturePyramidNetwork(list(config.widths), config.channels, LastLevelMaxPool())
        self.out_channels = config.channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images).feature_maps
        return self.fpn({str(i): y for i, y in enumerate(maps)})


class SeTformerMaskRcnn(SeTPreTrainedModel):
    """config.num_labels categories; config has, beyond SeTformerConfig, the arguments of `detect` by the same names."""

    config_class = SeTformerConfig
    base_model_prefix = "detector"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: SeTformerConfig) -> None:
        super().__init__(config)
        classes, channels = config.num_labels + 1, config.channels  # class 0 is the background
        shapes = ((0.5, 1.0, 2.0),) * len(PYRAMID_STRIDES)
        with torch.device("cpu"):  # transformers loads with "meta" as the default, which has no values
            anchors = AnchorGenerator(tuple((config.anchor_scale * stride,) for stride in PYRAMID_STRIDES), shapes)
        self.detector = MaskRCNN(
            PyramidBackbone(config), min_size=config.min_size, max_size=config.max_size, image_mean=MEAN,
            image_std=STD, rpn_anchor_generator=anchors, rpn_post_nms_top_n_train=config.proposals,
            rpn_post_nms_top_n_test=config.proposals, box_head=TwoMLPHead(channels * 7 * 7, config.head_width),
            box_predictor=FastRCNNPredictor(config.head_width, classes),
            mask_predictor=MaskRCNNPredictor(channels, channels, classes),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            box_batch_size_per_image=min(512, config.proposals),
        )  # fmt: skip
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torchvision's parts have drawn theirs, and the backbone is a model that draws its own."""

    def forward(self, pixel_values: list[Tensor], targets: list[dict[str, Tensor]] | None = None, **_: Any) -> Any:
        """In training {"loss", and its parts}; else, for each image, boxes, labels, scores and masks."""
        if not self.training:
            return self.detector(pixel_values)
        losses = self.detector(pixel_values, targets)
        return {"loss": sum(losses.values()), **losses}
