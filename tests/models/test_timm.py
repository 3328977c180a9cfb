"""SeTformer through timm's registry, and timm's ViT with its attention replaced."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from setformer_kernels.models import VISION_SIZES, initialize_references, replace_attention, setformer_nano
from setformer_kernels.models.timm import SeTAttentionLayer, TimmSeTformer
from setformer_kernels.nn import SeTAttention


def test_registry_knows_every_size() -> None:
    assert set(timm.list_models("setformer_*")) == set(VISION_SIZES)
    model = timm.create_model("setformer_tiny", num_classes=3)
    assert isinstance(model, TimmSeTformer)
    assert model.num_features == 768
    assert model.get_classifier().out_features == 3
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert model.stages[-1].blocks[-1].drop_path.rate == pytest.approx(VISION_SIZES["setformer_tiny"].drop_path_rate)


def test_arguments_and_heads() -> None:
    x = torch.randn(2, 1, 48, 64)
    model = timm.create_model("setformer_nano", in_chans=1, num_classes=5, global_pool="set", drop_rate=0.1)
    assert model(x).shape == (2, 5)
    assert model.head.dropout.p == 0.1
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 4 * 256)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 256)
    with pytest.raises(ValueError, match="global_pool must be one of avg, set, got 'max'"):
        timm.create_model("setformer_nano", global_pool="max")


def on_meta(name: str, **arguments: object) -> TimmSeTformer:
    return timm.create_model(name, device="meta", dtype=torch.float32, **arguments).eval()


@pytest.mark.parametrize("name", VISION_SIZES)
def test_every_size_keeps_the_contract_of_timms_models(name: str) -> None:
    """What timm's own tests ask of a convolutional model; shapes alone, so on the meta device."""
    model, x = on_meta(name), torch.empty(1, 3, 224, 224, device="meta")
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    config = model.default_cfg
    assert {config[key] + ".weight" for key in ("classifier", "first_conv")} <= model.state_dict().keys()
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *config["pool_size"])
    pooled = model.forward_head(features, pre_logits=True)
    for pool, width in (("avg", model.num_features), ("set", 4 * model.num_features), ("", model.num_features)):
        model.reset_classifier(0, pool)
        assert model.num_classes == 0
        assert model.head_hidden_size == width
        assert model.forward_head(features).shape == ((1, width) if pool else features.shape)
    assert on_meta(name, num_classes=0, global_pool="")(x).shape == features.shape
    model.reset_classifier(0, "avg")
    assert model.forward_head(features).shape == pooled.shape
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == dict(model.named_parameters()).keys()
    assert model.no_weight_decay() <= set(groups)
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, not_an_argument=1)


def test_new_heads_are_where_and_what_the_model_is() -> None:
    model = on_meta("setformer_nano", global_pool="set").double()
    model.reset_classifier(0)
    model.reset_classifier(2, "avg")
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", torch.float64)}
    assert not any(module.training for module in model.modules())
    model.requires_grad_(False)
    for pool in (None, ""):
        model.reset_classifier(0, pool)
        assert not any(p.requires_grad for p in model.parameters())


def test_a_reset_pool_is_saved(tmp_path: Path) -> None:
    model, x = timm.create_model("setformer_nano", num_classes=7).eval(), torch.randn(1, 3, 32, 32)
    model.reset_classifier(3, "set")
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_arguments_that_timm_models_share() -> None:
    model = timm.create_model("setformer_nano", attn_drop_rate=0.3, output_stride=16, features_only=True)
    dropouts = {m.dropout for m in model.modules() if isinstance(m, SeTAttention)}
    assert dropouts == {0.3}
    assert model.feature_info.reduction() == [4, 8, 16, 16]
    assert [y.shape[-1] for y in model(torch.randn(1, 3, 32, 64))] == [16, 8, 4, 4]
    for refused in ("img_size", "patch_size", "dynamic_img_size", "proj_drop_rate", "window_size"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{refused}'"):
            timm.create_model("setformer_nano", **{refused: 1})
    with pytest.raises(TypeError, match="attn_drop_rate and attention give the dropout"):
        timm.create_model("setformer_nano", attn_drop_rate=0.3, attention={"dropout": 0.1})
    for arguments in ({"output_stride": 4}, {"global_pool": "catavgmax"}):
        with pytest.raises(AssertionError, match="must be"):
            timm.create_model("setformer_nano", **arguments)


def test_weights_are_those_of_the_backbone() -> None:
    ours, theirs = setformer_nano(num_classes=5).eval(), timm.create_model("setformer_nano", num_classes=5).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(theirs(x), ours(x))


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (0, -1)])
def test_features_only(indices: tuple[int, ...]) -> None:
    x, widths = torch.randn(1, 3, 64, 96), VISION_SIZES["setformer_nano"].widths
    model = timm.create_model("setformer_nano", features_only=True, out_indices=indices)
    assert model.feature_info.channels() == [widths[i] for i in indices]
    assert model.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in indices]
    for y, channels, reduction in zip(
        model(x), model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert y.shape == (1, channels, 64 // reduction, 96 // reduction)
    assert not list(model.model.head.parameters())
    assert len(model.model.stages) == max(i % 4 for i in indices) + 1


def test_intermediates() -> None:
    model, x = timm.create_model("setformer_nano"), torch.randn(1, 3, 64, 64)
    last, maps = model.forward_intermediates(x, indices=2, output_fmt="NHWC")
    torch.testing.assert_close(maps[-1], last.permute(0, 2, 3, 1))
    assert [y.shape for y in maps] == [(1, 4, 4, 128), (1, 2, 2, 256)]


@pytest.mark.parametrize("kind", ["fx", "hook", "list", "dict", "getter"])
def test_every_feature_extractor_gives_the_maps(kind: str) -> None:
    whole, x = timm.create_model("setformer_nano").eval(), torch.randn(1, 3, 64, 96)
    model = timm.create_model("setformer_nano", features_only=True, feature_cls=kind, out_indices=(0, 2)).eval()
    weights = whole.state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():  # the names of some kinds begin and go on in their own way
            p.copy_(next(value for key, value in weights.items() if name.replace("stages_", "stages.").endswith(key)))
    found = model(x)
    found = list(found.values()) if kind == "dict" else found
    for got, want in zip(found, whole.forward_intermediates(x, indices=(0, 2), intermediates_only=True), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.autograd.grad(found[1].sum(), found[0])[0].any()


def test_pruned_models_go_on() -> None:
    x = torch.randn(2, 3, 32, 64)
    whole = timm.create_model("setformer_nano", global_pool="set").eval()
    maps = whole.forward_intermediates(x, intermediates_only=True)
    for i, want in enumerate(maps):
        stopped, taps = whole.forward_intermediates(x, [i], stop_early=True)
        torch.testing.assert_close((stopped, taps[0]), (want, want))
        model = copy.deepcopy(whole)
        assert model.prune_intermediate_layers([i]) == [i]
        for got in (model.forward_features(x), model(x), *model.forward_intermediates(x, [i])[1]):
            torch.testing.assert_close(got, want)
        model(x).sum().backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
        for pool, times in (("avg", 1), ("set", 4)):
            model.reset_classifier(7, pool)
            assert model(x).shape == (2, 7)
            assert model.head_hidden_size == times * model.num_features == times * want.shape[1]
    kept = copy.deepcopy(whole)
    kept.prune_intermediate_layers([3], prune_head=False)
    torch.testing.assert_close(kept(x), whole(x))


def test_optimizers_of_timm() -> None:
    model = timm.create_model("setformer_nano")
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    order = [model.stages[0].downsample[0].conv, model.stages[0].blocks[0].norm1, model.stages[3].blocks[0].norm1]
    first, middle, late = (scales[id(module.weight)] for module in order)
    assert first < middle < late
    kept = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(model.stages[0].blocks[0].attention.references) in kept
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.05)
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()


def test_saved_and_loaded_as_timm_does(tmp_path) -> None:
    model = timm.create_model("setformer_nano", num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = timm.create_model("setformer_nano", num_classes=4, checkpoint_path=str(tmp_path / "model.pth")).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x))


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True}, {"qkv_bias": False, "attn_drop_rate": 0.3}], ids=str)
def test_vit_with_its_attention_replaced(arguments: dict) -> None:
    model = timm.models.VisionTransformer(**VIT, **arguments)
    before = dict(model.named_parameters())
    report = replace_attention(model, num_references=5)
    assert report.replaced == {"blocks.0.attn": "Attention", "blocks.1.attn": "Attention"}
    assert not report.left
    assert str(replace_attention(model)).startswith("nothing replaced")
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    initialize_references(model, x)
    model(x).sum().backward()
    references = after["blocks.1.attn.set_transport.references"]
    assert references.grad.any()
    assert before["blocks.0.attn.qkv.weight"].grad.any()


def test_masks_of_a_replaced_vit_attention() -> None:
    attention = timm.models.VisionTransformer(**VIT).eval()
    replace_attention(attention, num_references=5)
    attention = attention.blocks[0].attn
    x, there = torch.randn(2, 6, 32), torch.arange(6) < 4
    want = attention(x[:, :4])
    mask = there.expand(2, 1, 6, 6)
    torch.testing.assert_close(attention(x, mask)[:, :4], want, rtol=1e-4, atol=1e-5)
    lowest = torch.zeros(2, 1, 6, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    torch.testing.assert_close(attention(x, lowest)[:, :4], want, rtol=1e-4, atol=1e-5)
    causal = attention(x, is_causal=True)
    torch.testing.assert_close(causal[:, :4], attention(x[:, :4], is_causal=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["name", "class", "options"])
def test_a_vision_transformer_of_timm_is_built_with_set_attention(by: str) -> None:
    layer = {
        "name": "set", "class": SeTAttentionLayer,
        "options": SeTAttentionLayer.with_options(num_references=5, learn_epsilon=True),
    }[by]  # fmt: skip
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**VIT, attn_layer=layer, qk_norm=True, attn_drop_rate=0.1)
    attention = model.blocks[1].attn
    assert isinstance(attention, SeTAttentionLayer)
    assert attention.set_transport.num_references == (5 if by == "options" else 64)
    assert (attention.set_transport.log_epsilon is not None) == (by == "options")
    assert not replace_attention(model).replaced
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert attention.set_transport.references.grad.any()
    assert attention.qkv.weight.grad.any()
    plain = timm.models.VisionTransformer(**VIT, qk_norm=True)
    replace_attention(plain, num_references=attention.set_transport.num_references, learn_epsilon=by == "options")
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


def test_an_attention_layer_with_unknown_options_is_refused() -> None:
    with pytest.raises(TypeError, match="unknown arguments of SeT attention: num_reference"):
        SeTAttentionLayer.with_options(num_reference=5)
    with pytest.raises(ValueError, match="position_dim must be 0"):
        SeTAttentionLayer.with_options(position_dim=2)
