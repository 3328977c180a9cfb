"""Feature extractors of torchvision and timm, which trace a model with torch.fx."""

from __future__ import annotations

import pytest
import torch

from setformer_kernels.models import SeTformer, replace_attention, setformer_nano
from setformer_kernels.models.vision import checked_image, grid_positions
from setformer_kernels.nn import SeTAttention, SeTPooling

torchvision = pytest.importorskip("torchvision")
extraction = pytest.importorskip("torchvision.models.feature_extraction")
timm = pytest.importorskip("timm")
import setformer_kernels.models.timm  # noqa: E402, F401


def small() -> SeTformer:
    return SeTformer((8, 8, 8, 8), (1, 1, 1, 1), (2, 2, 2, 2), num_references=3, num_classes=3, drop_path_rate=0.2)


def test_torchvision_extracts_from_our_model():
    model, image = small(), torch.randn(2, 3, 64, 64)
    nodes = {"stages.0.blocks.0.attention": "attention", "stages.2": "map", "head.fc": "logits"}
    extractor = extraction.create_feature_extractor(model, nodes).eval()
    found = extractor(image)
    torch.testing.assert_close(found["logits"], model.eval()(image))
    torch.testing.assert_close(found["map"], model.forward_maps(image)[2])
    assert found["attention"][0].shape == (2, 16 * 16, 8)


class Pyramid(torch.nn.Module):
    """A backbone of torchvision's detectors: the maps that a traced model gives, and a pyramid on them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.body = extraction.create_feature_extractor(model, {f"stages.{i}": str(i) for i in range(4)})
        self.fpn, self.out_channels = torchvision.ops.FeaturePyramidNetwork([8] * 4, 8), 8

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn(self.body(x))


def test_mask_rcnn_trains_on_extracted_maps():
    detection, names = torchvision.models.detection, ["0", "1", "2", "3"]
    anchors = detection.rpn.AnchorGenerator(tuple((4 * 2**i,) for i in range(4)), ((1.0,),) * 4)
    pools = {kind: torchvision.ops.MultiScaleRoIAlign(names, size, 2) for kind, size in (("box", 7), ("mask", 14))}
    model = detection.MaskRCNN(
        Pyramid(small()), min_size=64, max_size=64, rpn_anchor_generator=anchors, box_roi_pool=pools["box"],
        mask_roi_pool=pools["mask"], box_head=detection.faster_rcnn.TwoMLPHead(8 * 49, 8),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 2),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(8, (8,), 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(8, 8, 2),
    )  # fmt: skip
    target = {"boxes": torch.tensor([[3.0, 4, 30, 40]]), "labels": torch.tensor([1]),
              "masks": torch.ones(1, 64, 48, dtype=torch.uint8)}  # fmt: skip
    sum(model([torch.rand(3, 64, 48)], [target]).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert set(model.eval()([torch.rand(3, 48, 80)])[0]) == {"boxes", "labels", "scores", "masks"}


def test_extractors_check_the_image_and_survive_checkpointing():
    model = small()
    model.set_grad_checkpointing()
    extractor = extraction.create_feature_extractor(model, {"stages.3": "map"})
    extractor(torch.randn(1, 3, 64, 64))["map"].sum().backward()
    assert all(p.grad is not None for p in model.stages.parameters())
    with pytest.raises(ValueError, match="image must have height and width ≥ 32, got 20 × 64"):
        extractor(torch.randn(1, 3, 20, 64))


def test_timm_lists_what_it_must_not_trace():
    assert {SeTAttention, SeTPooling} <= set(timm.models.get_notrace_modules())
    assert {grid_positions, checked_image} <= set(timm.models.get_notrace_functions())


def test_torchvision_extracts_from_its_own_model_with_our_attention():
    from torchvision.models import VisionTransformer

    model, image = VisionTransformer(32, 8, 2, 2, 16, 32), torch.randn(1, 3, 32, 32)
    replace_attention(model, num_references=4)
    model.eval()
    layer = "encoder.layers.encoder_layer_1.self_attention"
    found = extraction.create_feature_extractor(model, {layer: "attention", "heads": "logits"})(image)
    torch.testing.assert_close(found["logits"], model(image))
    assert found["attention"][0].shape == (1, 17, 16)


def test_timm_extracts_by_graph():
    model = timm.create_model("setformer_nano", features_only=True, feature_cls="fx", out_indices=(0, 2)).eval()
    widths = setformer_nano().widths
    for y, width in zip(model(torch.randn(1, 3, 64, 64)), (widths[0], widths[2]), strict=True):
        assert width in y.shape


def test_timm_vit_with_our_attention_traces():
    model, image = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval(), torch.randn(1, 3, 32, 32)
    replace_attention(model, num_references=4)
    traced = torch.fx.symbolic_trace(model)
    assert any(node.target == "blocks.0.attn.set_transport" for node in traced.graph.nodes)
    torch.testing.assert_close(traced(image), model(image))
