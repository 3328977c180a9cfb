"""SeTformer: a four-stage hierarchical vision backbone whose attention is SeT attention, linear in the pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import SeTPooling
from .layers import DropPath, Mlp, initialize_weights, set_attention
from .sizes import VISION_SIZES

STRIDES = (4, 8, 16, 32)
POOLS = ("mean", "set")


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Centres of the cells of a height × width grid on the unit square, rows first: [height·width, 2], float32.

    Both sides have length 1, whatever the size: references learned at one resolution hold at another.
    """
    rows = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    columns = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)


class ConvNorm(nn.Module):
    """3 × 3 convolution of stride 2, then LayerNorm over channels: [B, h, w, C] -> [B, ⌈h/2⌉, ⌈w/2⌉, C']."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class VisionBlock(nn.Module):
    """x + γ₁·SeT(LN(x)), then x + γ₂·MLP(LN(x)); x [B, N, C], position [N, 2]."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, drop_path: float, layer_scale: float,
        position_scale: float | None, attention: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = set_attention(width, num_heads, position_scale, position_dim=2, **attention)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, round(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1 = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        y = self.norm1(x)
        where = {"query_position": position, "key_position": position} if self.attention.position_dim else {}
        y, _ = self.attention(y, y, y, need_weights=False, **where)
        x = x + self.drop_path(self.gamma1 * y)
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Downsampling, blocks, LayerNorm: [B, h, w, C] -> [B, h', w', C']."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[VisionBlock], width: int) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        height, width = x.shape[1:3]
        position = grid_positions(height, width, x.device)
        x = x.flatten(1, 2)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, position, use_reentrant=False)
            else:
                x = block(x, position)
        return self.norm(x).view(x.shape[0], height, width, x.shape[-1])


class PoolHead(nn.Module):
    """Logits [B, num_classes] of x [B, h, w, C]; num_classes = 0 gives the pooled features.

    pool="mean" averages the cells; pool="set" transports them onto references (SeTPooling) and reads these side by
    side, [B, M·C].
    """

    def __init__(
        self, width: int, num_classes: int, pool: str, num_heads: int, num_references: int, dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        self.pool = SeTPooling(width, num_heads, num_references=num_references) if pool == "set" else None
        self.num_features = width * (num_references if pool == "set" else 1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((1, 2)) if self.pool is None else self.pool(x.flatten(1, 2)).flatten(1)
        return pooled if pre_logits else self.fc(self.dropout(pooled))


class SeTformer(nn.Module):
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
        pool: of the classification head, "mean" or "set" (`SeTPooling` onto `pool_references` references).
        features_only: no head; forward returns the maps of the stages `out_indices` (0 to 3).
        dropout: before the classifier.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        layer_scale: γ at the start; 0.1 is CaiT's value for networks of up to 18 blocks.
        position_scale: τ at the start, None for no positional term.  With 4 a reference's Gaussian exp(−τ²d²) has
            deviation 0.18: 64 references cover the unit square about 1/8 apart, so each overlaps its neighbours.
        attention: further keyword arguments of every `SeTAttention` (num_iters, epsilon, value_map, dropout, ...).

    Shape:
        image [B, in_channels, height, width], both sides ≥ 32 -> [B, num_classes]; maps [B, C_i, ⌈height/stride_i⌉,
        ⌈width/stride_i⌉].

    Source: SeTformer (arXiv 2401.03540).
    """

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], *, mlp_ratio: float = 2.0,
        num_references: int = 64, in_channels: int = 3, num_classes: int = 1000, pool: str = "mean",
        pool_references: int = 4, features_only: bool = False, out_indices: Sequence[int] = (0, 1, 2, 3),
        dropout: float = 0.0, drop_path_rate: float = 0.0, layer_scale: float = 0.1, position_scale: float | None = 4.0,
        attention: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(widths, depths, num_heads, out_indices)
        self.widths, self.in_channels, self.num_classes = tuple(widths), in_channels, num_classes
        self.out_indices, self.features_only = tuple(out_indices), features_only
        self._head_arguments: dict[str, Any] = {
            "num_heads": num_heads[-1],
            "num_references": pool_references,
            "dropout": dropout,
        }
        self.pool = pool

        def block(stage: int, drop_path: float) -> VisionBlock:
            options = {**(attention or {}), "num_references": num_references}
            return VisionBlock(
                widths[stage], num_heads[stage], mlp_ratio, drop_path, layer_scale, position_scale, options
            )

        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        patches = nn.Sequential(ConvNorm(in_channels, widths[0] // 2), nn.GELU(), ConvNorm(widths[0] // 2, widths[0]))
        downsamples = [patches, *(ConvNorm(a, b) for a, b in itertools.pairwise(widths))]
        stages = [
            Stage(downsamples[i], [block(i, next(rates)) for _ in range(depths[i])], widths[i])
            for i in range(len(STRIDES))
        ]
        # Stages beyond the last map asked for would hold parameters that never get a gradient.
        self.stages = nn.ModuleList(stages[: max(self.out_indices) + 1] if features_only else stages)
        self.head = None if features_only else self._new_head()
        self.apply(initialize_weights)

    def _new_head(self) -> PoolHead:
        return PoolHead(self.widths[-1], self.num_classes, self.pool, **self._head_arguments)

    def reset_classifier(self, num_classes: int, pool: str | None = None) -> None:
        """A new head for num_classes classes (0: none, the pooled features); pool as it was, or the given one."""
        self.num_classes, self.pool = num_classes, pool or self.pool
        like = next(self.stages.parameters())
        self.head = self._new_head().apply(initialize_weights).to(like.device, like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass: memory of one block's activations instead of all blocks'."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.gradient_checkpointing = enable

    def forward_maps(self, image: Tensor) -> list[Tensor]:
        """Maps [B, C_i, h_i, w_i] of all stages there are."""
        check_image(image, self.in_channels)
        x, maps = image.permute(0, 2, 3, 1), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """The last map [B, C, h, w]."""
        return self.forward_maps(image)[-1]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] of the last map [B, C, h, w]; pre_logits: what the classifier reads instead."""
        if self.head is None:
            raise ValueError("features_only=True has no classification head")
        return self.head(features.permute(0, 2, 3, 1), pre_logits)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits [B, num_classes] or, with features_only, the maps of `out_indices`."""
        maps = self.forward_maps(image)
        return [maps[i] for i in self.out_indices] if self.features_only else self.forward_head(maps[-1])


def check_sizes(
    widths: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], out_indices: Sequence[int]
) -> None:
    for name, sizes in (("widths", widths), ("depths", depths), ("num_heads", num_heads)):
        if len(sizes) != len(STRIDES) or min(sizes) < 1:
            raise ValueError(f"{name} must be {len(STRIDES)} positive integers, one a stage, got {tuple(sizes)}")
    if widths[0] % 2:
        raise ValueError(f"widths must start with an even number: the first convolution has half, got {widths[0]}")
    if not out_indices or sorted(set(out_indices)) != list(out_indices) or not set(out_indices) <= {0, 1, 2, 3}:
        raise ValueError(f"out_indices must be increasing stage numbers from 0 to 3, got {tuple(out_indices)}")


def check_image(image: Tensor, in_channels: int) -> None:
    """[B, in_channels, height ≥ 32, width ≥ 32]: below, the last stage would see less than one cell a side."""
    if image.dim() != 4 or image.shape[1] != in_channels:
        raise ValueError(f"image must be [B, {in_channels}, height, width], got {list(image.shape)}")
    if image.shape[2] < STRIDES[-1] or image.shape[3] < STRIDES[-1]:
        raise ValueError(f"image must have height and width ≥ {STRIDES[-1]}, got {image.shape[2]} × {image.shape[3]}")


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
