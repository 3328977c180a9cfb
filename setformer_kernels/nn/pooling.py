"""SeTPooling: M tokens from S, the transport half of SeT attention (the OTKE embedding) as a layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional as SF
from .contract import AttentionInputError, check_dense, check_dtype, check_layout, check_masks, check_tensors, sizes
from .heads import COLUMNS
from .masks import blank_padding, key_mask_of
from .nested import packs, pad_all, pad_position, same_lengths, tokens_first
from .projections import OUT_PROJ, merge_heads, split_heads
from .reference_set import ReferenceSet
from .shards import whole_only
from .writing import Init, Reset

KV_PROJ: dict[str, Init] = {"weight": nn.init.xavier_uniform_, "bias": nn.init.zeros_}


class SeTPooling(ReferenceSet):
    """Pools any number of tokens into num_references tokens, in linear time.

    Per head, with k, v the projected tokens and f, c the potentials that transport the S keys onto the M references::

        z_j = Σ_s exp(ℓ_sj + f_s − c_j) v_s                  [M, D]: each column of weights sums to 1
        output_j = concat over heads(z_j) W_oᵀ + b_o         [embed_dim], for j = 1..M

    Args:
        embed_dim, num_heads, bias, device, dtype: as in `nn.MultiheadAttention`.
        num_references, num_iters, epsilon, bandwidth, kernel, value_map, position_dim, learn_epsilon, learn_log_mass,
            key_relaxation, reference_relaxation, backend, position_scale, tol, method, grad: as in `SeTAttention`.

    Shape:
        x [B, S, embed_dim] -> [B, num_references, embed_dim]; an element whose tokens are all masked pools to zeros
        (before the output projection).

    Raises:
        ValueError, TypeError: as in `SeTAttention`.

    Source: OTKE (arXiv 2006.12065).
    """

    of_heads: ClassVar[dict[str, int]] = {"kv_proj": 2, "out_proj": COLUMNS}  # beside its own parameters

    def __init__(
        self, embed_dim: int, num_heads: int, bias: bool = True, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, num_references: int = 64, num_iters: int = 3, epsilon: float = 0.05,
        bandwidth: float = 1.0, kernel: str = "rbf", value_map: str = "linear", position_dim: int = 0,
        learn_epsilon: bool = False, learn_log_mass: bool = False, key_relaxation: float = 1.0,
        reference_relaxation: float = 1.0, backend: str = "auto", position_scale: float = 1.0,
        tol: float | None = None, method: str = "sinkhorn", grad: str = "unrolled",
    ) -> None:  # fmt: skip
        embed_dim, num_heads, *_ = sizes(embed_dim, num_heads)
        bias = bool(bias)
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kv_proj = nn.Linear(embed_dim, 2 * embed_dim, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self._add_references(
            num_heads, self.head_dim, {"device": device, "dtype": dtype}, num_references=num_references,
            num_iters=num_iters, epsilon=epsilon, bandwidth=bandwidth, kernel=kernel, value_map=value_map,
            position_dim=position_dim, learn_epsilon=learn_epsilon, learn_log_mass=learn_log_mass,
            key_relaxation=key_relaxation, reference_relaxation=reference_relaxation, backend=backend,
            position_scale=position_scale, tol=tol, method=method, grad=grad,
        )  # fmt: skip
        Reset(self.kv_proj, KV_PROJ)
        Reset(self.out_proj, OUT_PROJ)
        self._reset_projections()

    def _reset_projections(self) -> None:
        for linear in (self.kv_proj, self.out_proj):
            linear.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as nn.MultiheadAttention does its own."""
        self._reset_projections()
        self._reset_references()

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self._own_repr()}"

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, key_position: Tensor | None = None, *,
        initial_potential: Tensor | None = None, return_info: bool = False,
    ) -> Any:  # fmt: skip
        """x [B, S, embed_dim] -> [B, M, embed_dim].

        Args:
            x: or a NestedTensor of B sequences, without mask; key_position may be nested then.
            key_padding_mask: [B, S]; bool True = ignore, or float, added to the tokens' log masses.
            key_position: [S, P] or [B, S, P], exactly when position_dim > 0.
            initial_potential: [B, H, M] in the place of the log masses that transport begins with, as in
                `functional.sinkhorn`: the `potential` of the last call's info.
            return_info: also a `functional.TransportInfo` of [B, H]: what transport reached.
        """
        whole_only(self.cp_context, x=isinstance(x, Tensor) and x.is_nested)
        if initial_potential is None and not return_info and self._packs(x, key_padding_mask, key_position):
            return self._forward_packed(x, key_position)
        x, key_padding_mask, key_position = self._padded("x", x, key_padding_mask, key_position)
        k, v = self._keys_values("x", x, key_padding_mask)
        options = {**self._transport_options(), **self._position_options(0, key_position=key_position)}
        options |= {"key_mask": key_mask_of(key_padding_mask, 0), "initial_potential": initial_potential}
        z = SF.set_pool(k, self._map_values(v), self.references, return_info=return_info, **options)
        if not return_info:
            return self.out_proj(merge_heads(z, batch_first=True))
        z, info = z
        return self.out_proj(merge_heads(z, batch_first=True)), info

    def _packs(self, x: Any, key_padding_mask: Any, key_position: Any) -> bool:
        """Whether a nested call can go without padding."""
        if not isinstance(x, Tensor) or not x.is_nested or not x.is_floating_point() or key_padding_mask is not None:
            return False
        if self._converges():
            return False
        if key_position is None:
            return packs(x)
        nested = isinstance(key_position, Tensor) and key_position.is_nested
        return nested and packs(x, key_position) and same_lengths(x, key_position)

    def _forward_packed(self, x: Any, key_position: Any) -> Tensor:
        """[B, M, embed_dim] from the rows of a jagged x."""
        k, v = self._keys_values("x", x.values().unsqueeze(0), None)
        place = None if key_position is None else key_position.values()
        options = {**self._transport_options(), **self._position_options(0, key_position=place)}
        rows = tokens_first(k), tokens_first(self._map_values(v))
        z = SF.set_pool_varlen(*rows, self.references, x.offsets(), **options)
        return self.out_proj(merge_heads(z, batch_first=True))

    def initialize_references(
        self, tokens: Tensor, key_padding_mask: Tensor | None = None, *, key_position: Tensor | None = None,
        num_iters: int = 20, init: str = "k-means++", generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        """Places the references on sample tokens [B, S, embed_dim]; see `SeTAttention.initialize_references`."""
        tokens, key_padding_mask, key_position = self._padded("tokens", tokens, key_padding_mask, key_position)
        k, v = self._keys_values("tokens", tokens, key_padding_mask)
        self._place_references(
            k, v, key_padding_mask, key_position, num_iters=num_iters, init=init, generator=generator
        )

    def _padded(
        self, name: str, x: Tensor, key_padding_mask: Tensor | None, key_position: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The arguments themselves or, where x is nested, padded; x is called `name` in messages."""
        mask, position = {"key_padding_mask": key_padding_mask}, {"key_position": key_position}
        check_tensors({name: x}, {**mask, **position})
        if not x.is_nested:
            check_dense({**mask, **position})
            return x, key_padding_mask, key_position
        (x,), padding = pad_all({name: x}, mask, batch_first=True)
        return x, padding, pad_position("key_position", key_position)

    def _keys_values(self, name: str, x: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """k, v [B, H, S, D] of input x, checked and called `name` in messages."""
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise AttentionInputError(f"{name} must be [B, S, {self.embed_dim}], got {tuple(x.shape)}")
        if type(self.kv_proj) is nn.Linear:  # what tools put in its place has weights of its own dtype
            check_dtype(name, x, self.kv_proj.weight)
        B, S, _ = x.shape
        check_layout(x, x, x, key_padding_mask, None)
        check_masks(key_padding_mask, None, x, B, self.num_heads, S, S, batched=True)
        if key_padding_mask is not None:
            x = blank_padding(x, x, key_padding_mask, batch_first=True)[0]
        k, v = (split_heads(part, self.num_heads, batch_first=True) for part in self.kv_proj(x).chunk(2, -1))
        return k, v
