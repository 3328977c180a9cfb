"""SeTformer: a four-stage hierarchical vision backbone whose attention is SeT attention, linear in the pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from ..nn import SeTPooling
from ..nn.doors import FloatInPython
from ..nn.writing import redraw
from ..tracing import leaf
from .layers import DropPath, Mlp, Recomputing, initialize_weights, set_attention
from .sizes import VISION_SIZES

STRIDES = (4, 8, 16, 32)
POOLS = ("mean", "set")


@leaf
def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Centres of the cells of a height × width grid on the unit square, rows first: [height·width, 2], float32.

    Both sides have length 1, whatever the size: references learned at one resolution hold at another.
    """
    rows = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    columns = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)


class ConvNorm(nn.Module):
    """3 × 3 convolution, then LayerNorm over channels: [B, C, h, w] -> [B, C', ⌈h/stride⌉, ⌈w/stride⌉], channels last
    in memory."""

    def __init__(self, in_channels: int, channels: int, stride: int = 2, dilation: int = 1, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, dilation, dilation, bias=False, **factory)
        self.norm = nn.LayerNorm(channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class VisionBlock(nn.Module):
    """x + γ₁·SeT(LN(x)), then x + γ₂·MLP(LN(x)); x [B, N, C], position [N, 2]."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, drop_path: float, layer_scale: float,
        position_scale: float | None, attention: Mapping[str, Any], **factory: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(width, **factory)
        self.attention = set_attention(width, num_heads, position_scale, position_dim=2, **attention, **factory)
        self.has_positions = position_scale is not None
        self.norm2 = nn.LayerNorm(width, **factory)
        self.mlp = Mlp(width, round(width * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path)
        self.layer_scale = layer_scale
        self.gamma1 = nn.Parameter(torch.empty(width, **factory))
        self.gamma2 = nn.Parameter(torch.empty(width, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the block's own parameters, γ; its layers have their own."""
        start = partial(nn.init.constant_, val=self.layer_scale)
        redraw(self, {"gamma1": start, "gamma2": start})

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        y = self.norm1(x)
        where = {"query_position": position, "key_position": position} if self.has_positions else {}
        y, _ = self.attention(y, y, y, need_weights=False, **where)
        x = x + self.drop_path(self.gamma1 * y)
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class Stage(Recomputing):
    """Downsampling, blocks, LayerNorm: [B, C, h, w] -> [B, C', h', w'], a view of the tokens [B, h'·w', C'].

    The map is what the next stage or the head reads, so that hooks and `retain_grad` on it see gradients.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[VisionBlock], width: int, **factory: Any) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, **factory)

    def forward(self, x: Tensor, downsample: bool = True) -> Tensor:
        """downsample=False: x is what `self.downsample` gave."""
        if downsample:
            x = self.downsample(x)
        height, width = x.shape[2], x.shape[3]
        position = grid_positions(height, width, x.device)
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = self.run(block, x, position)
        # a view: unflatten has no symbol in the exporters
        return self.norm(x).transpose(1, 2).view(x.shape[0], x.shape[-1], height, width)


class PoolHead(nn.Module):
    """Logits [B, num_classes] of x [B, h, w, C]; num_classes = 0 gives the pooled features.

    pool="mean" averages the cells; pool="set" transports them onto references (SeTPooling) and reads these side by
    side, [B, M·C]; pool="" leaves the cells: maps [B, num_classes, h, w] or [B, C, h, w].
    """

    def __init__(
        self, width: int, num_classes: int, pool: str, num_heads: int, num_references: int, dropout: float = 0.0,
        **factory: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if pool not in (*POOLS, ""):
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r} ('' would leave the cells)")
        self.kind = pool
        self.pool = SeTPooling(width, num_heads, num_references=num_references, **factory) if pool == "set" else None
        self.num_features = width * (num_references if pool == "set" else 1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(self.num_features, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.apply(initialize_weights)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool is not None:
            x = self.pool(x.flatten(1, 2)).flatten(1)
        elif self.kind == "mean":
            x = x.mean((1, 2))
        x = x if pre_logits else self.fc(self.dropout(x))
        return x if self.kind else x.permute(0, 3, 1, 2)


class SeTformer(FloatInPython):
    """Overlapping convolutional patches (stride 4), then four stages of SeT blocks at strides 4, 8, 16 and 32.

    Each stage halves both sides with a strided convolution (rounding up, so any size fits), runs its pre-norm blocks
    and ends in a LayerNorm, so that every stage's map serves a detector or segmenter as it is.  Cells carry their place
    on the unit square into the transport (2-D linear positional encoding).

    Args:
        widths, depths, num_heads: of the four stages; a head count divides its width.
        mlp_ratio: hidden units of an MLP / width.
        num_references: M of every attention.
        in_channels: of the image.
        num_classes: 0 leaves the pooled features.
        pool: of the classification head, "mean", "set" (`SeTPooling` onto `pool_references` references) or "" (logits
            of every cell).
        features_only: no head; forward returns the maps of the stages `out_indices` (0 to 3).
        output_stride: 8, 16 or 32, the largest stride; below 32 the last stages keep the resolution, and the
            convolutions that follow are dilated so that they read the same neighbours.
        dropout: before the classifier.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        layer_scale: γ at the start; 0.1 is CaiT's value for networks of up to 18 blocks.
        position_scale: τ at the start, None for no positional term.  With 4 a reference's Gaussian exp(−τ²d²) has
            deviation 0.18: 64 references cover the unit square about 1/8 apart, so each overlaps its neighbours.
        attention: further keyword arguments of every `SeTAttention` (num_iters, epsilon, value_map, dropout, ...).
        device, dtype: of the parameters.

    Shape:
        image [B, in_channels, height, width], both sides ≥ 32 -> [B, num_classes]; maps [B, C_i, ⌈height/stride_i⌉,
        ⌈width/stride_i⌉].

    Source: SeTformer (arXiv 2401.03540).
    """

    block_class: ClassVar[type[VisionBlock]] = VisionBlock

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], *, mlp_ratio: float = 2.0,
        num_references: int = 64, in_channels: int = 3, num_classes: int = 1000, pool: str = "mean",
        pool_references: int = 4, features_only: bool = False, out_indices: Sequence[int] = (0, 1, 2, 3),
        output_stride: int = 32, dropout: float = 0.0, drop_path_rate: float = 0.0, layer_scale: float = 0.1,
        position_scale: float | None = 4.0, attention: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        widths, depths, num_heads, self.out_indices = check_sizes(widths, depths, num_heads, out_indices)
        self.widths, self.num_heads = widths, num_heads
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        self.num_classes, self.features_only = checks.integer("num_classes", num_classes, 0), bool(features_only)
        if (output_stride := checks.integer("output_stride", output_stride)) not in STRIDES[1:]:
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        self.strides = tuple(min(stride, output_stride) for stride in STRIDES)
        mlp_ratio = checks.number("mlp_ratio", mlp_ratio, 0.0, open_low=True)
        drop_path_rate = checks.probability("drop_path_rate", drop_path_rate)
        layer_scale = checks.number("layer_scale", layer_scale, 0.0)
        position_scale = None if position_scale is None else checks.number("position_scale", position_scale, 0.0)
        self._head_arguments: dict[str, Any] = {
            "num_references": checks.integer("pool_references", pool_references, 1),
            "dropout": checks.probability("dropout", dropout),
        }
        self.pool = checks.plain(pool)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {**(attention or {}), "num_references": num_references}

        def block(stage: int, drop_path: float) -> VisionBlock:
            return self.block_class(
                widths[stage], num_heads[stage], mlp_ratio, drop_path, layer_scale, position_scale, options, **factory
            )

        # Stages beyond the last map asked for would hold parameters that never get a gradient.
        wanted = max(self.out_indices) + 1 if features_only else len(depths)
        self.stages = nn.Sequential(*self._new_stages(depths, drop_path_rate, block, factory)[:wanted])
        self.stages.apply(initialize_weights)
        self.head = None if features_only else self._new_head(**factory)

    def _new_stages(
        self, depths: Sequence[int], drop_path_rate: float, block: Callable[[int, float], VisionBlock],
        factory: Mapping[str, Any],
    ) -> list[Stage]:  # fmt: skip
        """All stages; stochastic depth grows by the block."""
        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        downsamples = list(self._downsamples(factory))
        return [
            Stage(downsamples[i], [block(i, next(rates)) for _ in range(depths[i])], self.widths[i], **factory)
            for i in range(len(depths))
        ]

    def _downsamples(self, factory: Mapping[str, Any]) -> Iterator[nn.Module]:
        """What each stage starts with."""
        half, width = self.widths[0] // 2, self.widths[0]
        yield nn.Sequential(
            ConvNorm(self.in_channels, half, **factory), nn.GELU(), ConvNorm(half, width, **factory)
        )  # fmt: skip
        dilation = 1
        for i in range(1, len(STRIDES)):
            stride = self.strides[i] // self.strides[i - 1]
            yield ConvNorm(self.widths[i - 1], self.widths[i], stride, dilation, **factory)
            dilation *= 2 // stride

    def _new_head(self, **factory: Any) -> PoolHead:
        last = len(self.stages) - 1
        return PoolHead(
            self.widths[last], self.num_classes, self.pool, self.num_heads[last], **self._head_arguments, **factory
        )

    def reset_classifier(self, num_classes: int, pool: str | None = None) -> None:
        """A new classifier of num_classes classes (0: none, the pooled features); the pooling as it is, or the given
        one."""
        self.num_classes = checks.integer("num_classes", num_classes, 0)
        self.pool = self.pool if pool is None else pool
        like, old = next(self.stages.parameters()), self.head
        head = self._new_head(device=like.device, dtype=like.dtype).train(self.training)
        if old is not None and old.kind == head.kind:
            head.pool = old.pool  # with what it has learned
        self.head = head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass: memory of one block's activations instead of all blocks'."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.set_grad_checkpointing(enable)

    def forward_maps(self, image: Tensor) -> list[Tensor]:
        """Maps [B, C_i, h_i, w_i] of all stages there are."""
        x, maps = checked_image(image, self.in_channels), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """The last map [B, C, h, w]."""
        return self.stages(checked_image(image, self.in_channels))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] of the last map [B, C, h, w]; pre_logits: what the classifier reads instead."""
        if self.head is None:
            raise ValueError("features_only=True has no classification head")
        return self.head(features.permute(0, 2, 3, 1), pre_logits)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits [B, num_classes] or, with features_only, the maps of `out_indices`."""
        if not self.features_only:
            return self.forward_head(self.forward_features(image))
        maps = self.forward_maps(image)
        return [maps[i] for i in self.out_indices]


def check_sizes(
    widths: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], out_indices: Sequence[int]
) -> list[tuple[int, ...]]:
    """The arguments as tuples of ints."""
    given = {"widths": widths, "depths": depths, "num_heads": num_heads, "out_indices": out_indices}
    sizes = {name: tuple(checks.integer(f"{name}[{i}]", s) for i, s in enumerate(v)) for name, v in given.items()}
    for name in ("widths", "depths", "num_heads"):
        if len(sizes[name]) != len(STRIDES) or min(sizes[name]) < 1:
            raise ValueError(f"{name} must be {len(STRIDES)} positive integers, one a stage, got {sizes[name]}")
    if sizes["widths"][0] % 2:
        raise ValueError(f"widths must start with an even number: the first convolution has half, got {widths[0]}")
    taken = sizes["out_indices"]
    if not taken or tuple(sorted(set(taken))) != taken or not set(taken) <= {0, 1, 2, 3}:
        raise ValueError(f"out_indices must be increasing stage numbers from 0 to 3, got {taken}")
    return list(sizes.values())


@leaf
def checked_image(image: Tensor, in_channels: int) -> Tensor:
    """image itself if it is [B, in_channels, height ≥ 32, width ≥ 32]: below, the last stage would see less than one
    cell a side."""
    if not image.is_floating_point():
        raise TypeError(f"image must be a floating-point tensor, got {image.dtype}")
    if image.dim() != 4 or image.shape[1] != in_channels:
        raise ValueError(f"image must be [B, {in_channels}, height, width], got {list(image.shape)}")
    if image.shape[2] < STRIDES[-1] or image.shape[3] < STRIDES[-1]:
        raise ValueError(f"image must have height and width ≥ {STRIDES[-1]}, got {image.shape[2]} × {image.shape[3]}")
    return image


def _named(name: str) -> Callable[..., SeTformer]:
    def build(**arguments: Any) -> SeTformer:
        return SeTformer(**{**VISION_SIZES[name].arguments(), **arguments})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`SeTformer` of the size {name!r} in `VISION_SIZES`; arguments as `SeTformer`."
    return build


setformer_nano = _named("setformer_nano")
setformer_tiny = _named("setformer_tiny")
setformer_small = _named("setformer_small")
setformer_base = _named("setformer_base")
