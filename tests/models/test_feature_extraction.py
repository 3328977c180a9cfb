"""Feature extractors of torchvision and timm, which trace a model with torch.fx."""

from __future__ import annotations

import pytest
import torch

from setformer_kernels.models import SeTformer, replace_attention, setformer_nano

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
