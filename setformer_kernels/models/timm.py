"""SeTformer in timm's registry: `import setformer_kernels.models.timm`, then `timm.create_model("setformer_tiny")`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .sizes import VISION_SIZES
from .vision import STRIDES, SeTformer

POOLS = {"avg": "mean", "set": "set"}  # timm's name -> ours


class TimmSeTformer(SeTformer):
    """`SeTformer` with the arguments and methods that timm expects; global_pool is "avg" or "set"."""

    def __init__(
        self, *, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", drop_rate: float = 0.0,
        **arguments: Any,
    ) -> None:  # fmt: skip
        self.global_pool = _known_pool(global_pool)
        super().__init__(
            **arguments, in_channels=in_chans, num_classes=num_classes, pool=POOLS[global_pool], dropout=drop_rate
        )
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"stages.{i}"}
            for i, (width, stride) in enumerate(zip(self.widths, STRIDES, strict=True))
        ]

    def get_classifier(self) -> nn.Module:
        return nn.Identity() if self.head is None else self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = _known_pool(global_pool)
        super().reset_classifier(num_classes, POOLS[self.global_pool])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates: a stage, or a block, is a group."""
        fine = [(r"^stages\.(\d+)\.downsample", (-1,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99,))]  # fmt: skip
        return {"stem": r"^stages\.0\.downsample", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """References and where they stand are directions and places, not weights."""
        names = ("references", "reference_position", "position_scale", "gamma1", "gamma2")
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in names}

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """Maps of the stages `indices`; each stage ends in its norm, so `norm` changes nothing."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        maps = self.forward_maps(x)
        taken = [maps[i] for i in feature_take_indices(len(self.stages), indices)[0]]
        if output_fmt == "NHWC":
            taken = [y.permute(0, 2, 3, 1) for y in taken]
        return taken if intermediates_only else (maps[-1], taken)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages behind the last of `indices`, and the head."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head or last + 1 < len(STRIDES):
            self.head = None
        return taken


def _known_pool(name: str) -> str:
    if name not in POOLS:
        raise ValueError(f"global_pool must be one of {', '.join(POOLS)}, got {name!r}")
    return name


default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000, "input_size": (3, 224, 224), "min_input_size": (3, 32, 32), "fixed_input_size": False,
            "interpolation": "bicubic", "crop_pct": 0.9, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "pool_size": (7, 7), "first_conv": "stages.0.downsample.0.conv", "classifier": "head.fc",
        }
        for name in VISION_SIZES
    }
)  # fmt: skip


def _entry(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        return build_model_with_cfg(
            TimmSeTformer, name, pretrained, feature_cfg=features, **{**VISION_SIZES[name].arguments(), **arguments}
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"timm's entry point of the size {name!r}; no pretrained weights exist."
    return build


for _name in VISION_SIZES:
    globals()[_name] = register_model(_entry(_name))
