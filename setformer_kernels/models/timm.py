"""SeTformer in timm's registry: `import setformer_kernels.models.timm`, then `timm.create_model("setformer_tiny")`; and
SeT attention as an attention layer of timm's vision transformers: `timm.create_model(name, attn_layer="set")`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
    vision_transformer,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..nn import SeTAttention, SeTPooling
from .convert.timm import SeTTimmAttention
from .convert.weights import like
from .sizes import VISION_SIZES
from .transport import OWN_DEFAULTS, SetTransport
from .vision import STRIDES, SeTformer, checked_image, grid_positions

POOLS = {"avg": "mean", "set": "set", "": ""}  # timm's name -> ours

for _module in (SeTAttention, SeTPooling, SetTransport):
    register_notrace_module(_module)
for _function in (checked_image, grid_positions):
    register_notrace_function(_function)


class TimmArgumentError(ValueError, AssertionError):
    """An argument that does not fit: a ValueError, and the AssertionError that timm's own models raise for it."""


class TimmSeTformer(SeTformer):
    """`SeTformer` with the arguments and methods that timm expects.

    global_pool is "avg", "set" or, for the map itself, ""; attn_drop_rate the dropout of every SeT attention.
    """

    def __init__(
        self, *, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", output_stride: int = 32,
        drop_rate: float = 0.0, attn_drop_rate: float = 0.0, attention: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:  # fmt: skip
        self.global_pool = _known_pool(global_pool)
        if output_stride not in STRIDES[1:]:
            raise TimmArgumentError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        attention = dict(attention or {})
        if attn_drop_rate and attention.setdefault("dropout", attn_drop_rate) != attn_drop_rate:
            raise TypeError("attn_drop_rate and attention give the dropout: pass one of them")
        super().__init__(
            **arguments, in_channels=in_chans, num_classes=num_classes, pool=POOLS[global_pool],
            output_stride=output_stride, dropout=drop_rate, attention=attention,
        )  # fmt: skip
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"stages.{i}"}
            for i, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True))
        ]

    @property
    def head_hidden_size(self) -> int:
        """Numbers of an image that the classifier reads; without pooling, of a cell."""
        assert self.head is not None
        return self.head.num_features

    def get_classifier(self) -> nn.Module:
        assert self.head is not None
        return self.head.fc

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
            raise TimmArgumentError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        x, taken = checked_image(x, self.in_channels), []
        for i, stage in enumerate(itertools.islice(self.stages, last + 1 if stop_early else None)):
            x = stage(x)
            if i in wanted:
                taken.append(x if output_fmt == "NCHW" else x.permute(0, 2, 3, 1))
        return taken if intermediates_only else (x, taken)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages behind the last of `indices`, and then, or with prune_head, pooling and classifier."""
        taken, last = feature_take_indices(len(self.stages), indices)
        if last + 1 < len(self.stages):
            self.stages = nn.Sequential(*itertools.islice(self.stages, last + 1))
            self.num_features, prune_head = self.widths[last], True
        if prune_head:
            self.reset_classifier(0, "")
        return taken


def _known_pool(name: str) -> str:
    if name not in POOLS:
        names = ", ".join(filter(None, POOLS))
        raise TimmArgumentError(f"global_pool must be one of {names}, got {name!r} ('' would leave the map)")
    return name


class SeTAttentionLayer(SeTTimmAttention, vision_transformer.Attention):
    """timm's `Attention`, by the same constructor, with SeT attention in the place of softmax, to train from scratch:
    an `attn_layer` of its vision transformers, by name "set" (timm 1.0.16 or later) or as a class.

    own: arguments of `SeTAttention` beyond those of `nn.MultiheadAttention`; `with_options` makes a class of others.
    """

    own: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vision_transformer.Attention.__init__(self, *args, **kwargs)
        self.set_transport = SetTransport(self.num_heads, self.head_dim, like(self), self.own)

    @classmethod
    def with_options(cls, **own: Any) -> type[SeTAttentionLayer]:
        """The class with these arguments, which timm's constructors, taking a class, have no place for.

        Raises:
            TypeError: SeT attention has no such argument.
        """
        if unknown := own.keys() - OWN_DEFAULTS.keys():
            raise TypeError(f"unknown arguments of SeT attention: {', '.join(sorted(unknown))}")
        if own.get("position_dim"):
            raise ValueError(f"position_dim must be 0: timm passes no positions, got {own['position_dim']}")
        return type(cls.__name__, (cls,), {"own": {**cls.own, **own}, "__module__": __name__})


getattr(vision_transformer, "ATTN_LAYERS", {})["set"] = SeTAttentionLayer

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
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "flatten_sequential": True}
        return build_model_with_cfg(
            TimmSeTformer, name, pretrained, feature_cfg=features, **{**VISION_SIZES[name].arguments(), **arguments}
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"timm's entry point of the size {name!r}; no pretrained weights exist."
    return build


for _name in VISION_SIZES:
    globals()[_name] = register_model(_entry(_name))
