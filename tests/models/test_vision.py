"""The SeTformer backbones: sizes, shapes, invariances, what can be done with them, and that they learn."""

from __future__ import annotations

import copy
import math
import re
from functools import partial

import pytest
import torch
from counting import multiply_adds, parameters
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from setformer_kernels import models
from setformer_kernels.models import VISION_SIZES, SeTformer, setformer_nano
from setformer_kernels.models.layers import DropPath
from setformer_kernels.models.vision import grid_positions
from setformer_kernels.nn import SeTAttention, SeTPooling


def small(**arguments: object) -> SeTformer:
    """One block a stage, 4 references: as many code paths as any size, in float64."""
    sizes = {"widths": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "num_heads": (2, 2, 2, 2), "num_references": 4}
    return SeTformer(**{**sizes, "num_classes": 5, **arguments}).double()


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_sizes_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """tiny about 20 M, small between tiny and base; what base must be, the tests of its heads say."""
    lines = ["", "| | parameters, 1000 classes | backbone alone | GFLOPs at 224 × 224 | at 1280 × 800 |"]
    bodies, costs = {}, {}
    for name in VISION_SIZES:
        with FakeTensorMode():
            model, backbone = getattr(models, name)(), getattr(models, name)(features_only=True)
            photo, wide = (
                multiply_adds(partial(backbone, torch.empty(1, 3, *size))) for size in ((224, 224), (800, 1280))
            )
        bodies[name], costs[name] = parameters(backbone), wide
        numbers = f"{parameters(model) / 1e6:.1f} M | {bodies[name] / 1e6:.1f} M | {photo / 1e9:.2f} | {wide / 1e9:.1f}"
        lines.append(f"| {name} | {numbers} |")
    with capsys.disabled():
        print("\n".join(lines))
    assert bodies["setformer_tiny"] == pytest.approx(20e6, rel=0.05)
    for measured in (bodies, costs):
        tiny, small_, base = (measured[f"setformer_{name}"] for name in ("tiny", "small", "base"))
        assert small_ == pytest.approx(math.sqrt(tiny * base), rel=0.05)


def test_cost_is_linear_in_the_pixels() -> None:
    with FakeTensorMode():
        model = setformer_nano(features_only=True)
        cost = [multiply_adds(partial(model, torch.empty(1, 3, n, n))) for n in (256, 512, 1024)]
    assert cost[1] == 4 * cost[0]
    assert cost[2] == 16 * cost[0]


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (47, 90), (64, 32)], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"pool": "set"}, {"position_scale": None}, {"in_channels": 1}], ids=str)
def test_any_size(size: tuple[int, int], arguments: dict) -> None:
    model = small(**arguments)
    x = image(2, arguments.get("in_channels", 3), *size)
    assert model(x).shape == (2, 5)
    for stride, width, y in zip((4, 8, 16, 32), model.widths, model.forward_maps(x), strict=True):
        assert y.shape == (2, width, -(-size[0] // stride), -(-size[1] // stride))


def test_samples_do_not_mix_and_every_parameter_learns() -> None:
    model = small(pool="set", attention={"value_map": "rkhs", "learn_epsilon": True, "learn_log_mass": True})
    x = image(3, 3, 40, 64)
    y = model(x)
    torch.testing.assert_close(y[1:2], model(x[1:2]))
    y.square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # One cell is left in the last stage along one side; τ and π still matter along the other.
    assert not dead


def test_features_only_gives_the_maps_of_the_classifier() -> None:
    model = small()
    some = small(features_only=True, out_indices=(0, 2))
    assert len(some.stages) == 3
    assert some.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    x = image(1, 3, 48, 64)
    want = model.forward_maps(x)
    for got, index in zip(some(x), (0, 2), strict=True):
        torch.testing.assert_close(got, want[index])
    with pytest.raises(ValueError, match="no classification head"):
        some.forward_head(want[-1])


def true_gradients(model: SeTformer, x: Tensor) -> list[Tensor]:
    """Of the summed last map with respect to each map, from the stages behind it alone."""
    gradients = []
    for i, y in enumerate(model.forward_maps(x)):
        y = y.detach().requires_grad_()
        gradients += torch.autograd.grad(model.stages[i + 1 :](y).sum(), y)
    return gradients


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "rows last", "every other pixel"])
@pytest.mark.parametrize("arguments", [{}, {"features_only": True}], ids=str)
def test_maps_are_on_the_path_of_what_follows(layout: str, arguments: dict) -> None:
    model, x = small(**arguments), image(2, 3, 70, 44)
    x = {"channels last": x.contiguous(memory_format=torch.channels_last), "rows last": x.mT.contiguous().mT,
         "every other pixel": x.repeat_interleave(2, -1)[..., ::2]}.get(layout, x)  # fmt: skip
    maps = model(x) if model.features_only else model.forward_maps(x)
    for y in maps:
        y.retain_grad()
    maps[-1].sum().backward()
    for y, want in zip(maps, true_gradients(model, x), strict=True):
        torch.testing.assert_close(y.grad, want)


@pytest.mark.parametrize("pool", ["mean", "set", ""])
def test_class_activation_maps_by_hooks(pool: str) -> None:
    """Grad-CAM: what a hook on the last stage keeps has the gradient of a class's logit."""
    model, x, kept = small(pool=pool), image(2, 3, 64, 96), []
    model.stages[-1].register_forward_hook(lambda module, args, y: kept.append(y))
    (got,) = torch.autograd.grad(model(x)[:, 1].sum(), kept[0])
    y = kept[0].detach().requires_grad_()
    (want,) = torch.autograd.grad(model.forward_head(y)[:, 1].sum(), y)
    torch.testing.assert_close(got, want)
    assert got.shape == (2, 16, 2, 3)
    assert got.any()


def test_maps_are_no_copies() -> None:
    """A map is a view of its stage's last norm, and what the next convolution reads."""
    model, written, read = small(), [], []
    for stage in model.stages:
        stage.norm.register_forward_hook(lambda module, args, y: written.append(y.data_ptr()))
    for stage in model.stages[1:]:
        stage.downsample.conv.register_forward_pre_hook(lambda module, args: read.append(args[0].data_ptr()))
    maps = model.forward_maps(image(2, 3, 64, 96))
    assert [y.data_ptr() for y in maps] == written
    assert read == written[:-1]
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)


@pytest.mark.parametrize("stride", [8, 16])
def test_output_stride(stride: int) -> None:
    model, coarse, x = small(output_stride=stride), small(), image(1, 3, 72, 40)
    coarse.load_state_dict(model.state_dict())
    assert model.strides == tuple(min(s, stride) for s in (4, 8, 16, 32))
    for y, s in zip(model.forward_maps(x), model.strides, strict=True):
        assert y.shape[2:] == (-(-72 // s), -(-40 // s))
    # the convolutions read the neighbours that they read at stride 32
    y = x = image(1, 8, 17, 22)
    for fine, rough in zip(model.stages[1:], coarse.stages[1:], strict=True):
        x, y = fine.downsample(x), rough.downsample(y)
    step = 32 // stride
    torch.testing.assert_close(x[..., ::step, ::step], y)


def test_mean_head_and_new_heads() -> None:
    model, x = small(), image(2, 3, 32, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head.fc(features.mean((2, 3))))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, pool="set")
    assert isinstance(model.head.pool, SeTPooling)
    assert model(x).shape == (2, 4 * 16)


def test_new_classifiers_keep_the_pooling_and_the_mode() -> None:
    model, x = small(pool="set").eval(), image(1, 3, 32, 32)
    model.requires_grad_(False)
    want = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), want)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_no_pooling_leaves_the_map() -> None:
    model, x = small(pool="", num_classes=0), image(2, 3, 33, 64)
    torch.testing.assert_close(model(x), model.forward_features(x))
    model.reset_classifier(7)
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head.fc(features.movedim(1, -1)).movedim(-1, 1))
    assert model(x).shape == (2, 7, 2, 2)


def test_device_and_dtype() -> None:
    model = setformer_nano(pool="set", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    y = model(torch.empty(2, 3, 64, 64, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((2, 1000), torch.bfloat16)


def test_positions_are_those_of_the_cells() -> None:
    position = grid_positions(2, 4, torch.device("cpu"))
    assert position.shape == (8, 2)
    assert position[5].tolist() == [0.75, 0.375]  # row 1 of 2, column 1 of 4


def test_gradient_checkpointing_changes_memory_only() -> None:
    model, x = small(drop_path_rate=0.5), image(4, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_gradient_checkpointing_saves_fewer_tensors() -> None:
    def saved(enable: bool) -> int:
        model, total = small(depths=(1, 1, 6, 1)), 0
        model.set_grad_checkpointing(enable)

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(image(1, 3, 128, 128))
        return total

    assert saved(True) < 0.6 * saved(False)


def test_drop_path() -> None:
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = drop(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(x), x)
    rates = [m.rate for m in small(drop_path_rate=0.4).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_autocast_stays_near_float32() -> None:
    model, x = small().float(), image(2, 3, 64, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    want = model(x)
    assert (y.float() - want).norm() < 0.05 * want.norm()


@pytest.mark.slow
def test_compile_without_graph_breaks_and_without_recompiling_for_a_size() -> None:
    torch._dynamo.reset()
    model = small(features_only=True, out_indices=(1,)).float()  # two stages have every kind of code there is
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((36, 70), (90, 44), (64, 129)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(torch.randn(2, 3, size[0] + 8, size[1] + 8))[0].sum().backward()


def test_export_with_dynamic_sizes() -> None:
    model = small().float().eval()
    # From 33: at 32 pixels the last map is one cell wide, a size that torch.export specialises on.
    sides = {2: torch.export.Dim("height", min=33, max=2048), 3: torch.export.Dim("width", min=33, max=2048)}
    shapes = {"image": {0: torch.export.Dim("batch", max=64), **sides}}
    program = torch.export.export(model, (torch.randn(2, 3, 48, 80),), dynamic_shapes=shapes)
    x = torch.randn(3, 3, 97, 35)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_state_dict_round_trip_and_deep_copy() -> None:
    model, other = small(), small()
    other.load_state_dict(model.state_dict())
    x = image(1, 3, 32, 32)
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_initialize_references_places_every_layer_and_nothing_else() -> None:
    model = small(pool="set").train()
    before = copy.deepcopy(model.state_dict())
    models.initialize_references(model, image(2, 3, 96, 96))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    layers = [name for name, m in model.named_modules() if isinstance(m, (SeTAttention, SeTPooling))]
    assert {name for name in changed if name.endswith(".references")} == {f"{name}.references" for name in layers}
    assert all(re.search(r"\.(references|reference_position)$", name) for name in changed)
    assert model.training
    assert not any(m._forward_pre_hooks_with_kwargs for m in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths must be 4 positive integers.*got \(1, 1, 1\)"),
        ({"widths": (8, 8, 0, 8)}, r"widths must be 4 positive integers"),
        ({"widths": (9, 8, 8, 8), "num_heads": (1, 1, 1, 1)}, r"widths must start with an even number.*got 9"),
        ({"num_heads": (3, 2, 2, 2)}, r"divisible by num_heads, got embed_dim=8 and num_heads=3"),
        ({"out_indices": (2, 1)}, r"out_indices must be increasing stage numbers from 0 to 3, got \(2, 1\)"),
        ({"output_stride": 4}, r"output_stride must be 8, 16 or 32, got 4"),
        ({"pool": "max"}, r"pool must be one of mean, set, got 'max'"),
        ({"drop_path_rate": 1.0}, r"drop path rate must be in \[0, 1\), got 1.0"),
        ({"attention": {"epsilon": 0.0}}, r"epsilon"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 31, 64), r"image must have height and width ≥ 32, got 31 × 64"),
        ((1, 1, 64, 64), r"image must be \[B, 3, height, width\], got \[1, 1, 64, 64\]"),
        ((3, 64, 64), r"image must be \[B, 3, height, width\], got \[3, 64, 64\]"),
    ],
    ids=str,
)
def test_bad_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(image(*shape))


def test_learns_handwritten_digits() -> None:
    """8 × 8 digits at 32 × 32, 60 steps: well above the tenth that guessing gets."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.from_numpy(part) for part in datasets.load_digits(return_X_y=True))
    x = nn.functional.interpolate(pixels.float().view(-1, 1, 8, 8) / 16, size=(32, 32), mode="bilinear")
    train, test = torch.arange(len(x)) % 4 != 0, torch.arange(len(x)) % 4 == 0
    model = setformer_nano(in_channels=1, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(60):
        rows = train.nonzero().squeeze(1)[torch.randint(int(train.sum()), (64,))]
        loss = nn.functional.cross_entropy(model(x[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == labels[test]).double().mean().item()
    assert accuracy > 0.9
