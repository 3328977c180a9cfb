"""What SeTAttention and SeTPooling share: the learned reference set, the constants of transport, the initialisation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as SF
from ..problem import compute_dtype
from ..tracing import Leaf
from .contract import check_key_position, own_options
from .doors import FloatInPython
from .kmeans import cluster_means, spherical_kmeans
from .masks import present_of
from .shards import SOFTMAX, refuse_shards_of_others
from .writing import Init, assign, redraw


def draw_directions(x: Tensor) -> None:
    """Rows of x [..., D] uniform on the unit sphere."""
    x.copy_(F.normalize(x.normal_(), dim=-1))


class ReferenceSet(Leaf, FloatInPython):
    """Mixin: M references per head and how tokens are carried to them (definition: docs/definition.md).

    Parameters (those not asked for are None):
        references [H, M, D]; landmarks [H, D, D] (value_map="rkhs", R = D); log_epsilon [H] (learn_epsilon);
        reference_log_mass [H, M] (learn_log_mass); reference_position [H, M, P], position_scale [H] (position_dim > 0).
    """

    num_references: int
    num_iters: int
    epsilon: float
    bandwidth: float
    kernel: str
    value_map: str
    position_dim: int
    key_relaxation: float
    reference_relaxation: float
    backend: str
    tol: float | None = None  # this and the next two: of modules pickled before they were arguments, too
    method: str = "sinkhorn"
    grad: str = "unrolled"
    initial_position_scale: float = 1.0  # of modules pickled before it was an argument
    cp_context: Any = None  # where the tokens are a shard of a sequence: `distributed.context_parallel` sets it
    references: nn.Parameter
    landmarks: nn.Parameter | None
    log_epsilon: nn.Parameter | None
    reference_log_mass: nn.Parameter | None
    reference_position: nn.Parameter | None
    position_scale: nn.Parameter | None

    def _add_references(self, num_heads: int, head_dim: int, factory: dict[str, Any], **own: Any) -> None:
        """Checks the own arguments (all that the classes have), keeps them, creates the parameters they ask for."""
        own = own_options(**own)
        learn_epsilon, learn_log_mass = own.pop("learn_epsilon"), own.pop("learn_log_mass")
        self.initial_position_scale = own.pop("position_scale")
        for name, option in own.items():
            setattr(self, name, option)
        H, M, D, P = num_heads, self.num_references, head_dim, self.position_dim
        shapes: dict[str, tuple[int, ...] | None] = {
            "references": (H, M, D),
            "landmarks": (H, D, D) if self.value_map == "rkhs" else None,
            "log_epsilon": (H,) if learn_epsilon else None,
            "reference_log_mass": (H, M) if learn_log_mass else None,
            "reference_position": (H, M, P) if P else None,
            "position_scale": (H,) if P else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **factory)))
        self._reset_references()

    def _reset_references(self) -> None:
        """Directions uniform on the unit sphere, reference positions in the unit cube, uniform masses, ε and τ as the
        constructor was told."""
        inits: dict[str, Init] = {
            "references": draw_directions,
            "landmarks": draw_directions,
            "log_epsilon": partial(nn.init.constant_, val=math.log(self.epsilon)),
            "reference_log_mass": nn.init.zeros_,
            "reference_position": nn.init.uniform_,
            "position_scale": partial(nn.init.constant_, val=self.initial_position_scale),
        }
        redraw(self, inits)

    def _converges(self) -> bool:
        """Whether transport is anything but num_iters iterations."""
        return self.tol is not None or self.method != "sinkhorn" or self.grad != "unrolled"

    def _own_repr(self) -> str:
        solved = f", tol={self.tol}, method={self.method}, grad={self.grad}" if self._converges() else ""
        return (
            f"num_references={self.num_references}, num_iters={self.num_iters}, epsilon={self.epsilon},"
            f" kernel={self.kernel}, value_map={self.value_map}, position_dim={self.position_dim}{solved}"
        )

    def _transport_options(self) -> dict[str, Any]:
        """The keyword arguments every SF call of this module shares, read at call time."""
        epsilon: float | Tensor = self.epsilon
        if self.log_epsilon is not None:
            epsilon = self.log_epsilon.to(compute_dtype(self.log_epsilon.dtype)).exp()
        options = {
            "kernel": self.kernel,
            "bandwidth": self.bandwidth,
            "epsilon": epsilon,
            "num_iters": self.num_iters,
            "reference_log_mass": self.reference_log_mass,
            "key_relaxation": self.key_relaxation,
            "reference_relaxation": self.reference_relaxation,
            "backend": self.backend,
        }
        if self.tol is not None or self.method != "sinkhorn" or self.grad != "unrolled":
            options |= {"tol": self.tol, "method": self.method, "grad": self.grad}
        if self.cp_context is not None:
            options["cp_context"] = self.cp_context
        elif F.scaled_dot_product_attention is not SOFTMAX:
            refuse_shards_of_others()
        return options

    def _position_options(self, slots: int, **token_positions: Tensor | None) -> dict[str, Any]:
        """Token positions [N, P] or [B, N, P] as SF arguments; appended key slots carry no position term."""
        given = [name for name, position in token_positions.items() if position is not None]
        if self.position_dim == 0:
            if given:
                raise ValueError(f"{', '.join(given)} given, but the module was built with position_dim=0")
            return {}
        missing = [name for name in token_positions if name not in given]
        if missing:
            raise ValueError(
                f"position_dim={self.position_dim} needs {' and '.join(missing)}"
                f" ([N, {self.position_dim}] or [B, N, {self.position_dim}]), got None"
            )
        options: dict[str, Any] = {
            **token_positions,
            "reference_position": self.reference_position,
            "position_scale": self.position_scale,
        }
        if slots:
            position = token_positions["key_position"]
            assert position is not None
            # a row of NaN has no position, and so no position term; integers hold no NaN
            position = position if position.is_floating_point() else position.float()
            options["key_position"] = F.pad(position, (0, 0, 0, slots), value=math.nan)
        return options

    def _map_values(self, value: Tensor) -> Tensor:
        """value [B, H, S, D] itself, or its centred Nyström features ψ(v) [B, H, S, R = D]."""
        if self.landmarks is None:
            return value
        return SF.nystrom_features(value, self.landmarks, bandwidth=self.bandwidth, center=True, backend=self.backend)

    @torch.no_grad()
    def _place_references(
        self, key: Tensor, value: Tensor | None, key_padding_mask: Tensor | None, key_position: Tensor | None, *,
        num_iters: int, init: str, generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        """Spherical k-means of key (and, for landmarks, value) [B, H, S, D]; key_padding_mask [B, S]."""
        B, _, S, _ = key.shape
        check_key_position(key_position, B, S, self.position_dim)
        if self.landmarks is not None and value is None:
            raise ValueError('value_map="rkhs" places landmarks on values: pass `value` as in forward')
        keep = None if key_padding_mask is None else present_of(key_padding_mask)

        def chosen(x: Tensor) -> Tensor:  # [B, S, ...] -> [n, ...], computed in float32 or better
            x = x.flatten(0, 1) if keep is None else x[keep]
            return x.to(compute_dtype(x.dtype))

        options: dict[str, Any] = {"num_iters": num_iters, "init": init, "generator": generator}
        keys = chosen(key.transpose(1, 2)).transpose(0, 1)  # [H, n, D]
        centres, labels = spherical_kmeans(keys, self.num_references, **options)
        placed = {"references": centres}
        if self.landmarks is not None and value is not None:
            values = chosen(value.transpose(1, 2)).transpose(0, 1)
            placed["landmarks"] = spherical_kmeans(values, self.landmarks.shape[1], **options)[0]
        if self.reference_position is not None and key_position is not None:
            places = chosen(key_position.expand(B, S, -1))
            placed["reference_position"] = cluster_means(places, labels, self.reference_position)
        assign(self, placed)
