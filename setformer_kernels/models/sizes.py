"""The named vision backbones: one table, with the reason for every number that is not a convention."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

HEAD_DIM = 32  # D, in every stage of every size: as in Swin and NAT, which the paper compares with


@dataclass(frozen=True)
class VisionSize:
    """What tells one backbone from another; one entry a stage, at strides 4, 8, 16 and 32."""

    widths: tuple[int, int, int, int]  # channels
    depths: tuple[int, int, int, int]  # blocks
    num_references: int  # M, per head
    drop_path_rate: float  # stochastic depth of the last block in training; grows linearly from 0
    mlp_ratio: float = 2.0  # as NAT's small and base

    @property
    def num_heads(self) -> tuple[int, ...]:
        return tuple(width // HEAD_DIM for width in self.widths)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `SeTformer`."""
        return asdict(self) | {"num_heads": self.num_heads}


# base: the paper's three comparisons.  A UPerNet head grows faster with the last stage's width than a Mask R-CNN head:
#   33 % below 123 M parameters in the one and 38 % below 109 M in the other leave the same 47 M for the backbone only
#   with a last width of 1024.  29 % below 496 G FLOPs (multiply-adds at 1280 × 800) then asks for many blocks at
#   strides 4 and 8, which attention linear in the pixels can afford.
# tiny: about 20 M.  small: about the geometric mean of the two, with tiny's widths and base's depths.
# nano: for tests and laptops.
# Stochastic depth: Swin's and NAT's rates, which grow with the size.
VISION_SIZES = {
    "setformer_nano": VisionSize((32, 64, 128, 256), (1, 1, 2, 1), num_references=16, drop_path_rate=0.0),
    "setformer_tiny": VisionSize((96, 192, 384, 768), (3, 3, 5, 2), num_references=64, drop_path_rate=0.2),
    "setformer_small": VisionSize((96, 192, 384, 768), (4, 4, 9, 3), num_references=64, drop_path_rate=0.3),
    "setformer_base": VisionSize((128, 256, 512, 1024), (4, 4, 6, 3), num_references=64, drop_path_rate=0.5),
}
