"""The base backbone under the heads of the paper's comparisons, counted."""

from __future__ import annotations

import pytest
import torch
import transformers
from counting import multiply_adds, parameters
from torch._subclasses import FakeTensorMode
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from setformer_kernels.models import setformer_base, setformer_small, setformer_tiny

# Millions of parameters and, at 1280 × 800, billions of multiply-adds of what base is compared with, and by how many
# per cent less it has; the paper gives whole per cents.
FOCALNET_BASE_MASK_RCNN, FEWER_PARAMETERS, FEWER_FLOPS = (109, 496), 38, 29
NAT_BASE_UPERNET, FEWER_THAN_NAT = 123, 33


def mask_rcnn(widths: tuple[int, ...]) -> tuple[int, int]:
    """Parameters and multiply-adds of torchvision's FPN, RPN, box head and mask head (91 classes, as it ships them).

    At 1280 × 800, with 1000 proposals through the box head and 100 boxes through the mask head.
    """
    fpn, rpn = FeaturePyramidNetwork(list(widths), 256, LastLevelMaxPool()), RPNHead(256, 3)
    box = torch.nn.Sequential(TwoMLPHead(256 * 7 * 7, 1024), FastRCNNPredictor(1024, 91))
    mask = torch.nn.Sequential(MaskRCNNHeads(256, (256,) * 4, 1), MaskRCNNPredictor(256, 256, 91))

    def run() -> None:
        maps = {str(i): torch.empty(1, w, 800 >> i + 2, 1280 >> i + 2) for i, w in enumerate(widths)}
        rpn(list(fpn(maps).values()))
        box(torch.empty(1000, 256, 7, 7))
        mask(torch.empty(100, 256, 14, 14))

    return parameters(fpn, rpn, box, mask), multiply_adds(run)


def upernet(widths: tuple[int, ...]) -> int:
    """Parameters of transformers' UPerNet head: 512 channels, pools of 1, 2, 3 and 6, 150 classes, auxiliary FCN."""
    config = transformers.UperNetConfig(num_labels=150, hidden_size=512, auxiliary_in_channels=widths[2])
    return parameters(UperNetHead(config, list(widths)), UperNetFCNHead(config, list(widths)))


def fewer(mine: float, theirs: float) -> float:
    """By how many per cent mine is less."""
    return 100 * (1 - mine / theirs)


def test_base_is_as_much_smaller_as_the_paper_says(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["", "| | Mask R-CNN | 1280 × 800 | UPerNet |"]
    for build in (setformer_tiny, setformer_small, setformer_base):
        with FakeTensorMode():
            backbone = build(features_only=True)
            size, flops = mask_rcnn(backbone.widths)
            flops += multiply_adds(lambda: backbone(torch.empty(1, 3, 800, 1280)))  # noqa: B023
            detector, segmenter = parameters(backbone) + size, parameters(backbone) + upernet(backbone.widths)
        numbers = detector / 1e6, flops / 1e9, segmenter / 1e6
        lines.append(f"| {build.__name__} | {numbers[0]:.1f} M | {numbers[1]:.0f} G | {numbers[2]:.1f} M |")
    less = [fewer(*pair) for pair in zip(numbers, (*FOCALNET_BASE_MASK_RCNN, NAT_BASE_UPERNET), strict=True)]
    with capsys.disabled():
        print("\n".join(lines))
        print(f"base: {less[0]:.1f} % fewer parameters, {less[1]:.1f} % fewer FLOPs; UPerNet: {less[2]:.1f} % fewer")
    for got, want in zip(less, (FEWER_PARAMETERS, FEWER_FLOPS, FEWER_THAN_NAT), strict=True):
        assert got == pytest.approx(want, abs=0.5)
