"""Tensor parallelism: the heads of SeT attention on several ranks, each with its own references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from ..nn import SeTAttention
from ..nn.heads import COLUMNS, ROWS, SHARED
from ..nn.projections import Projections
from ..nn.reference_set import ReferenceSet
from .of_rank import OfRank, become, cut, enter, gathered, place, rows_of

NAMES = {2: ("weight_k", "weight_v"), 3: ("weight_q", "weight_k", "weight_v")}  # of what a packed weight is cut into
ATTENTION = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class SeTParallel(ParallelStyle):
    """A style of `torch.distributed.tensor.parallel.parallelize_module` for SeT attention: heads on several ranks.

    For `SeTAttention`, `SeTPooling`, the attention of the package's models and of converted models of timm; of a
    converted model of transformers for `set_transport`, beside ColwiseParallel for its projections of q, k and v and
    RowwiseParallel for that of the output.  A rank has num_heads / ranks heads: rows of the projections q, k and v
    each, columns of the output projection, and of everything that is per head (references, landmarks, log_epsilon,
    reference_log_mass, reference_position, position_scale, gates).  A call has two collectives: the sum of outputs,
    and in the backward pass that of the gradients of tokens.

    Parameters are DTensors.  Packed projections become a parameter each (`q_proj_weight`, `k_proj_weight`,
    `v_proj_weight`; of linear layers `weight_q`, ...), as no placement gives a rank rows of each: make the optimizer
    afterwards.  `load_state_dict` takes what one process saved; `full_state_dict` gives it.

    Results, gradients and returned weights (of all heads) are those of one process within rounding.  What is kept per
    head stays on its rank: memories, states, `TransportInfo`, `initial_potential`.  Dropout draws from one seed on all
    ranks, other numbers on each: the masks of heads are independent, and not those of one process.

    Args:
        input_layouts: of tokens that come as plain tensors, Replicate by default; DTensors say themselves.
        output_layouts: Replicate by default, Shard(1) to scatter the tokens of a batch-first output.
        use_local_output: plain tensors rather than DTensors.

    Raises:
        ValueError: the module is none of these, or the ranks do not divide its heads (of keys, too).
        TypeError: a layout is no Placement.
    """

    def __init__(
        self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, layout in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
            if layout is not None and not isinstance(layout, Placement):
                raise TypeError(f"{name} must be a Placement or None, got {type(layout).__name__}")
        self.input_layouts = Replicate() if input_layouts is None else input_layouts
        self.output_layouts = Replicate() if output_layouts is None else output_layouts
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        parts = getattr(module, "of_heads", {})
        if isinstance(module, OfRank) or (not parts and not isinstance(module, ReferenceSet)):
            kind = type(module).__name__
            raise ValueError(f"SeTParallel is for SeTAttention, SeTPooling and SeT attention of models, got {kind}")
        check_heads(module, device_mesh.size())
        if isinstance(module, SeTAttention):
            self._attention(module, device_mesh)
        elif isinstance(module, ReferenceSet):
            self._by_rows(module, device_mesh, TokensOfRank if parts else TransportOfRank)
        else:
            become(module, TokensOfRank, device_mesh)
        vars(module)["layout"] = self.input_layouts
        for name, kind in parts.items():
            if (child := getattr(module, name)) is not None:
                self._part(child, kind, device_mesh)
        for name in ("num_heads", "num_kv_heads"):
            if getattr(module, name, None) is not None:
                setattr(module, name, getattr(module, name) // device_mesh.size())
        return module

    @property
    def source(self) -> int | None:
        """The rank whose values count."""
        return getattr(self, "src_data_rank", 0)

    def _by_rows(
        self, module: nn.Module, mesh: DeviceMesh, mixin: type[OfRank], at: dict[str, Placement] | None = None
    ) -> OfRank:
        """Rows of all of a module's own parameters, but for those that lie as `at` says."""
        for name in dict(module.named_parameters(recurse=False)):
            place(module, mesh, name, (at or {}).get(name, Shard(0)), self.source)
        return become(module, mixin, mesh)

    def _attention(self, module: SeTAttention, mesh: DeviceMesh) -> None:
        wide, narrow = module.num_heads * module.head_dim, module.key_heads * module.head_dim
        rows = [wide, narrow, narrow]
        pieces: dict[str, tuple[Sequence[str], list[int]]] = {}
        if module._qkv_same_embed_dim:
            cut(module, "in_proj_weight", ATTENTION, rows)
            pieces["in_proj_weight"] = ATTENTION, rows
            module.register_parameter("in_proj_weight", None)
            module._qkv_same_embed_dim = False
        at = {"bias_k": Shard(2), "bias_v": Shard(2), "in_proj_bias": Replicate()}
        of_rank = self._by_rows(module, mesh, AttentionOfRank, at)
        of_rank.pieces = pieces
        of_rank.summed = {"in_proj_bias": rows_of(rows, mesh.get_local_rank(), mesh.size())}

    def _part(self, child: nn.Module, kind: int, mesh: DeviceMesh) -> None:
        if kind == COLUMNS:
            self._columns(child, mesh)
        elif kind == ROWS:
            self._by_rows(child, mesh, TransportOfRank if isinstance(child, ReferenceSet) else OfRank)
        elif kind == SHARED:
            names = [name for name, _ in child.named_parameters(recurse=False)]
            self._by_rows(child, mesh, OfRank, dict.fromkeys(names, Replicate())).summed = dict.fromkeys(names, whole)
        else:
            self._packed(child, kind, mesh)

    def _columns(self, child: nn.Module, mesh: DeviceMesh) -> None:
        style = RowwiseParallel(output_layouts=self.output_layouts, use_local_output=self.use_local_output)
        style.src_data_rank = self.source
        parallelize_module(child, mesh, style).register_forward_hook(waited)

    def _packed(self, child: nn.Module, parts: int, mesh: DeviceMesh) -> None:
        """A linear layer, or a convolution of each channel, whose rows are heads, `parts` times."""
        rows, names = [len(child.get_parameter("weight")) // parts] * parts, NAMES[parts]
        cut(child, "weight", names, rows)
        of_rank = self._by_rows(child, mesh, OfRank, {"bias": Replicate()})
        of_rank.pieces, of_rank.joined = {"weight": (names, rows)}, ("weight",)
        of_rank.summed = {"bias": rows_of(rows, mesh.get_local_rank(), mesh.size())}
        self._narrow(child, mesh)

    @staticmethod
    def _narrow(child: nn.Module, mesh: DeviceMesh) -> None:
        for name in ("out_features", "in_channels", "out_channels", "groups"):
            if hasattr(child, name):
                setattr(child, name, getattr(child, name) // mesh.size())


def whole(x: Tensor) -> Tensor:
    return x


def waited(module: nn.Module, args: Any, output: Any) -> Any:
    """A hook: rows [T, embed_dim] themselves, not a promise of them, of which no nested tensor can be made."""
    return output.clone() if output.dim() == 2 and isinstance(output, AsyncCollectiveTensor) else output


def check_heads(module: nn.Module, ranks: int) -> None:
    """ValueError unless so many ranks can have equal numbers of heads."""
    if reason := getattr(module, "whole_heads", lambda: "")():
        raise ValueError(f"SeTParallel cannot divide this {type(module).__name__}: {reason}")
    heads: dict[str, Any] = {"num_heads": getattr(module, "num_heads", None)}
    if isinstance(module, Projections):
        heads["num_kv_heads"] = module.key_heads
    if isinstance(module, ReferenceSet):
        heads.setdefault("num_kv_heads", module.references.shape[0])
    for name, number in heads.items():
        if number is not None and number % ranks != 0:
            raise ValueError(f"{name} must be a multiple of the number of ranks, {ranks}, got {number}")


def own_seed(seed: Tensor | None, rank: int) -> Tensor | None:
    """A seed that no other rank has, of one that all have."""
    return None if seed is None else seed ^ (rank * 0x9E3779B97F4A7C15 % 2**63)


class PlacedOfRank(OfRank):
    """A reference set: each rank places its own heads' references."""

    def initialize_references(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad(), self.locally():
            super().initialize_references(*args, **kwargs)  # type: ignore[misc]


class TokensOfRank(PlacedOfRank):
    """A module that is called with tokens first."""

    layout: Placement

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with self.locally() as outermost:
            return super(OfRank, self).forward(enter(x, self.mesh, self.layout) if outermost else x, *args, **kwargs)


class TransportOfRank(PlacedOfRank):
    """The heads of others: what it is given are this rank's already."""

    seed: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._called("forward", args, kwargs)

    def packed(self, *args: Any, **kwargs: Any) -> Any:
        return self._called("packed", args, kwargs)

    def weights(self, *args: Any, **kwargs: Any) -> Any:
        with self.locally():
            return super().weights(*args, **kwargs)  # type: ignore[misc]

    def _called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.locally():
            if self.training and kwargs.get("dropout_p", 0.0) > 0.0:
                device = args[0].device
                self.seed = own_seed(torch.randint(2**63 - 1, (), device=device), self.mesh.get_local_rank())
            try:
                return getattr(super(OfRank, self), name)(*args, **kwargs)
            finally:
                self.seed = None

    def _transport_options(self) -> dict[str, Any]:
        options = super()._transport_options()  # type: ignore[misc]
        return options if self.seed is None else {**options, "seed": self.seed}


class AttentionOfRank(PlacedOfRank):
    """SeTAttention: see `SeTParallel`."""

    layout: Placement

    def forward(
        self, query: Any, key: Any = None, value: Any = None, key_padding_mask: Any = None, need_weights: bool = True,
        attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False, **others: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        with self.locally() as outermost:
            if outermost:
                query, key, value = self._entered(query, key, value)
                key_padding_mask = self._entered_mask(key_padding_mask)
                attn_mask = self._mask_of_rank(self._entered_mask(attn_mask), query)
            output, weights = super(OfRank, self).forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, **others
            )
        if weights is None or not outermost:
            return output, weights
        if not average_attn_weights:
            return output, gathered(weights, self.mesh, Shard(weights.dim() - 3))
        return output, gathered(weights / self.mesh.size(), self.mesh, Partial())

    def memory(self, key: Any, value: Any, key_padding_mask: Any = None, **others: Any) -> Any:
        """Of this rank's heads: z [B, Hk / ranks, M, D] and g [B, Hk / ranks, M]."""
        with self.locally():
            key, value = self._entered(key, value)
            return super().memory(key, value, self._entered_mask(key_padding_mask), **others)  # type: ignore[misc]

    def _entered(self, *tokens: Any) -> list[Any]:
        """One tensor given thrice stays one."""
        entered = {id(x): enter(x, self.mesh, self.layout) for x in tokens}
        return [entered[id(x)] for x in tokens]

    def _entered_mask(self, mask: Any) -> Any:
        """A mask of numbers may have a gradient."""
        if isinstance(mask, DTensor) or (isinstance(mask, Tensor) and mask.requires_grad):
            return enter(mask, self.mesh, Replicate())
        return mask

    def _mask_of_rank(self, mask: Any, query: Any) -> Any:
        """Of attn_mask [B·H, L, S] the rows of this rank's heads; others are for all heads."""
        if not isinstance(mask, Tensor) or mask.dim() != 3 or not isinstance(query, Tensor) or query.is_nested:
            return mask
        ranks = self.mesh.size()
        whole = self.num_heads * ranks  # type: ignore[operator]
        B = query.shape[0 if self.batch_first else 1] if query.dim() == 3 else 1
        if mask.shape[0] != B * whole:
            raise ValueError(f"attn_mask must be [L, S] or [{B * whole}, L, S], got {list(mask.shape)}")
        return mask.unflatten(0, (B, whole)).chunk(ranks, 1)[self.mesh.get_local_rank()].flatten(0, 1)

    def _dropout_options(self, device: torch.device) -> dict[str, Any]:
        options = super()._dropout_options(device)  # type: ignore[misc]
        return {**options, "seed": own_seed(options["seed"], self.mesh.get_local_rank())}
