"""SeTAttention: a drop-in for nn.MultiheadAttention whose time and memory are linear in the sequence length."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from .. import functional as SF
from .contract import (
    AttentionInputError,
    check_dense,
    check_layout,
    check_masks,
    check_pairs,
    check_tensors,
    check_width,
    key_heads,
    sizes,
)  # fmt: skip
from .fastpath import PythonForward, keep_python_forward  # noqa: F401  (pickles of earlier versions name it here)
from .heads import COLUMNS
from .masks import attention_mask_of, blank_padding, key_mask_of
from .nested import from_rows, nest_like, packs, pad, pad_all, pad_position, same_lengths, tokens_first
from .projections import OUT_PROJ, PROJECTIONS, Projections, merge_heads
from .reference_set import ReferenceSet
from .shards import whole_only
from .writing import Reset, redraw

READ = ("kernel", "bandwidth", "epsilon", "backend")  # of the options of transport, those of a read


class SeTAttention(ReferenceSet, PythonForward, Projections):
    """SeT attention with the constructor, call, masks, attributes and state of `nn.MultiheadAttention`.

    Per head, with q, k, v the projected tokens (L queries, S keys), y the M references, ℓ the kernel logits, and c, g
    the potentials of `num_iters` Sinkhorn iterations that transport keys onto references::

        z_j = Σ_s exp(ℓ_sj + f_s − c_j) v_s                   [M, D]: the keys, pooled onto the references
        o_i = Σ_j softmax_j(ℓ(q_i, y_j) + g_j) z_j            [L, D]: read back by the queries
        output = concat over heads(o) W_oᵀ + b_o              [L, embed_dim]

    Time O((L + S)·M·embed_dim) and memory linear in L + S, with these exceptions: returned weights
    (`need_weights=True`, the default as in torch: pass False where they are not needed) take O(L·S) memory; a
    query-dependent `attn_mask`, and causal calls with num_iters > 1, take O(num_iters·L·S·M) time, and O(L·S) memory
    where the CPU backend does not run.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `nn.MultiheadAttention`, same order and defaults.  Dropout acts on the reading weights [L, M].
        num_references: M, per head.
        num_iters: T ≥ 0, Sinkhorn iterations, a pass over the keys each.  T ≤ 1 makes causal calls linear in time.
            More bring the plan nearer to the optimum, for plans that are read, small ε, relaxed marginals; measured
            models gained nothing by them (`docs/quality.md`).
        epsilon: ε > 0, entropic regularisation, in units of the kernel (whose values lie in (0, 1] for "rbf").
        bandwidth: β > 0 of the "rbf" kernel exp(β(⟨x̂, ŷ⟩ − 1)), without unit; unused by "dot".
        kernel: "rbf" (on directions; lengths are ignored) or "dot" (⟨x, y⟩, for projections that are features).
        value_map: "linear" pools v itself; "rkhs" pools its centred Nyström features (`functional.
            nystrom_features`) on head_dim learned landmarks: the form of the SeTformer paper, without its constant.
        position_dim: P > 0 adds −τ²‖p − π‖² to the logits, p the token positions that forward must then be given, π
            learned `reference_position` [H, M, P], τ learned `position_scale` [H].  Positions come in any unit;
            references start in the unit cube, so use positions in [0, 1] or call `initialize_references`.
        learn_epsilon: learn `log_epsilon` [H], one ε per head, starting at epsilon.
        learn_log_mass: learn `reference_log_mass` [H, M], starting uniform.
        key_relaxation, reference_relaxation: λ in [0, 1], 1 = balanced marginals.
        backend: "auto", or a name of `setformer_kernels.available_backends()`.
        position_scale: τ ≥ 0 at the start.
        num_kv_heads: Hk, a divisor of num_heads, which it is by default: grouped queries, head h on key head
            h // (num_heads / Hk).  Key and value projections, and all that is per head above, are then Hk heads'.
        tol, method, grad: transport to convergence, as in `functional.sinkhorn`: each head stops once its potentials
            move less than tol, num_iters is the most; without attn_mask and is_causal.

    Shape:
        query [L, B, embed_dim], key [S, B, kdim], value [S, B, vdim]; with batch_first B leads; unbatched without B.
        Output as query; weights [B, L, S] or, unaveraged, [B, H, L, S].

    Raises:
        ValueError: sizes, shapes and masks (also an AssertionError and RuntimeError, which torch raises for them).
        TypeError: arguments of the wrong type or dtype.

    Sources: SeTformer (arXiv 2401.03540); OTKE (arXiv 2006.12065).
    """

    of_heads: ClassVar[dict[str, int]] = {"out_proj": COLUMNS}  # beside its own parameters

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
        add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, num_references: int = 64,
        num_iters: int = 1, epsilon: float = 0.05, bandwidth: float = 1.0, kernel: str = "rbf",
        value_map: str = "linear", position_dim: int = 0, learn_epsilon: bool = False, learn_log_mass: bool = False,
        key_relaxation: float = 1.0, reference_relaxation: float = 1.0, backend: str = "auto",
        position_scale: float = 1.0, num_kv_heads: int | None = None, tol: float | None = None,
        method: str = "sinkhorn", grad: str = "unrolled",
    ) -> None:  # fmt: skip
        embed_dim, num_heads, kdim, vdim = sizes(embed_dim, num_heads, kdim, vdim)
        num_kv_heads = key_heads(num_heads, num_kv_heads)
        dropout = checks.probability("dropout", dropout)
        super().__init__(
            embed_dim, num_heads, dropout, bool(bias), bool(add_bias_kv), bool(add_zero_attn), kdim, vdim,
            bool(batch_first), device, dtype,
        )  # fmt: skip
        self._narrow_keys(num_kv_heads)
        self._add_references(
            num_kv_heads, self.head_dim, {"device": device, "dtype": dtype}, num_references=num_references,
            num_iters=num_iters, epsilon=epsilon, bandwidth=bandwidth, kernel=kernel, value_map=value_map,
            position_dim=position_dim, learn_epsilon=learn_epsilon, learn_log_mass=learn_log_mass,
            key_relaxation=key_relaxation, reference_relaxation=reference_relaxation, backend=backend,
            position_scale=position_scale, tol=tol, method=method, grad=grad,
        )  # fmt: skip
        if num_kv_heads != num_heads:
            redraw(self, PROJECTIONS)
        Reset(self.out_proj, OUT_PROJ)
        self._ensure_hook()

    def _reset_parameters(self) -> None:
        """Draws all parameters anew: the projections as torch does, then the references."""
        redraw(self, PROJECTIONS)
        redraw(self.out_proj, {"bias": nn.init.zeros_})
        # nn.MultiheadAttention.__init__ calls this before there are references
        if hasattr(self, "references"):
            self._reset_references()

    # an alias, not a call: tools patch either name onto the other
    reset_parameters = _reset_parameters

    def extra_repr(self) -> str:
        grouped = "" if self.key_heads == self.num_heads else f", num_kv_heads={self.key_heads}"
        layout = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}{grouped}, batch_first={self.batch_first}"
        return f"{layout}, {self._own_repr()}"

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None,
        key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False, *, query_position: Tensor | None = None,
        key_position: Tensor | None = None, memory: SF.SetMemory | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Output and, if need_weights, attention weights; arguments as in `nn.MultiheadAttention.forward`.

        Args:
            query, key, value: see the class.  A NestedTensor (all three, batch_first, no masks) gives a nested output,
                and weights as of its padded form; positions may be nested then.  A jagged one without weights (and
                without slots, and num_iters ≤ 1 if causal) is not padded: its rows are a packed batch.
            key_padding_mask: [B, S] or [S] (unbatched); bool True = ignore, or float, added to the keys' log masses.
            need_weights: whether to return the weights; the output does not depend on it.
            attn_mask: [L, S], [B·H, L, S] or, unbatched, [H, L, S]; bool True = forbid, or float, added to log masses.
            average_attn_weights: mean over heads.
            is_causal: beside a square attn_mask, the promise that it is the causal mask; alone, causal attention:
                linear for num_iters ≤ 1, which the mask without this promise is not, and a warning says so once.
            query_position, key_position: [L, P] and [S, P], or [B, L, P] and [B, S, P] (batch first in both layouts),
                exactly when position_dim > 0.
            memory: what `memory` returned, in place of keys, values and masks: O(L·M) time whatever their number was.
                There are no weights then: None, also with need_weights.
        """
        if memory is not None:
            given = {"key": key, "value": value, "key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
            return self._read(query, memory, query_position, {**given, "key_position": key_position}, is_causal), None
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        positions = {"query_position": query_position, "key_position": key_position}
        optional = {**masks, **positions}
        check_tensors({"query": query, "key": key, "value": value}, optional)
        assert key is not None
        assert value is not None
        if self.cp_context is not None:
            slots_added = self.bias_k is not None or self.add_zero_attn
            whole_only(self.cp_context, need_weights=need_weights, query=query.is_nested, add_bias_kv=slots_added)
        if query.is_nested or key.is_nested or value.is_nested:
            nested = query
            if not need_weights and self._packs((query, key, value), {**masks, **positions}, is_causal):
                return self._forward_packed(query, key, value, is_causal, positions), None
            (query, key, value), padding = pad_all(
                {"query": query, "key": key, "value": value}, masks, self.batch_first
            )
            output, weights = self.forward(
                query, key, value, padding, need_weights, None, average_attn_weights, is_causal,
                query_position=pad_position("query_position", query_position),
                key_position=pad_position("key_position", key_position),
            )  # fmt: skip
            return nest_like(output, nested), weights
        check_dense(optional)
        batched, B = self._check_call(query, key, value, key_padding_mask, attn_mask)
        if key_padding_mask is not None and key is not query:
            key, value = blank_padding(key, value, key_padding_mask, self.batch_first)
        q, k, v = self._project(query, key, value)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        S = k.shape[-2]
        k, v, slots = self._append_slots(k, v)
        mask, causal = attention_mask_of(attn_mask, is_causal, slots, B, self.num_heads, q.shape[-2], S, q.device)
        options = self._transport_options()
        options |= {"key_mask": key_mask_of(key_padding_mask, slots), "attn_mask": mask, "causal": causal}
        if self.dropout > 0.0:
            options |= self._dropout_options(q.device)
        if self.position_dim or query_position is not None or key_position is not None:
            options |= self._position_options(slots, **positions)
        inputs, weights = (q, k, self._map_values(v), self.references), None
        if need_weights:
            heads, weights = SF.attention_and_weights(*inputs, average=average_attn_weights, **options)
        else:
            heads = SF.set_attention(*inputs, **options)
        output = self.out_proj(merge_heads(heads, self.batch_first or not batched))
        if batched:
            return output, weights
        return output.squeeze(0), None if weights is None else weights.squeeze(0)

    def _packs(self, tokens: tuple[Any, ...], optional: dict[str, Any], is_causal: bool) -> bool:
        """Whether a nested call can go without padding: jagged, no slots or masks, causal only as a scan."""
        masks, positions = list(optional.values())[:2], [p for p in list(optional.values())[2:] if p is not None]
        query, key, value = tokens
        return (
            self.batch_first
            and not self._converges()
            and self.bias_k is None
            and not self.add_zero_attn
            and all(mask is None for mask in masks)
            and all(position.is_nested for position in positions)
            and packs(*tokens, *positions)
            and same_lengths(key, value)
            and all(same_lengths(*pair) for pair in zip(positions, tokens, strict=False))
            and (not is_causal or (self.num_iters <= 1 and same_lengths(query, key)))
        )

    def _forward_packed(
        self, query: Any, key: Any, value: Any, is_causal: bool, positions: dict[str, Any]
    ) -> Tensor:  # fmt: skip
        """Output of a nested call, from the rows of its tensors; one tensor given thrice stays one."""
        q = query.values()
        k = q if key is query else key.values()
        v = q if value is query else k if value is key else value.values()
        self._check_call(q, k, v, None, None)
        q, k, v = self._project(q, k, v)
        places = {name: None if at is None else at.values() for name, at in positions.items()}
        heads = SF.set_attention_varlen(
            tokens_first(q), tokens_first(k), tokens_first(self._map_values(v)), self.references, query.offsets(),
            key.offsets(), causal=is_causal, **self._transport_options(), **self._dropout_options(q.device),
            **self._position_options(0, **places),
        )  # fmt: skip
        return from_rows(self.out_proj(heads.flatten(-2)), query)

    def memory(
        self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, *, key_position: Tensor | None = None,
        initial_potential: Tensor | None = None, return_info: bool = False,
    ) -> Any:  # fmt: skip
        """Keys and values carried onto the references, for `forward(query, memory=...)` of any number of queries.

        `forward(query, key, value, key_padding_mask)` is the same, but with weights.  Differentiable.

        Args:
            key, value, key_padding_mask, key_position: as in `forward`; nested where forward takes them nested.
            initial_potential: [B, Hk, M] in the place of the log masses that transport begins with, as in
                `functional.sinkhorn`: the g of an earlier memory, detached.
            return_info: also a `functional.TransportInfo` of [B, Hk]: what transport reached.

        Returns:
            z [B, Hk, M, D] and g [B, Hk, M] in float32 (float64 of a float64 module); B = 1 of unbatched keys.
            With return_info this memory and the info.
        """
        masks, places = {"key_padding_mask": key_padding_mask}, {"key_position": key_position}
        check_tensors({"key": key, "value": value}, {**masks, **places})
        if key.is_nested or value.is_nested:
            (key, value), key_padding_mask = pad_all({"key": key, "value": value}, masks, self.batch_first)
            key_position = pad_position("key_position", key_position)
        check_dense({"key_padding_mask": key_padding_mask, "key_position": key_position})
        batched = check_layout(key, key, value, key_padding_mask, None)
        check_pairs(key, value, packed=self._qkv_same_embed_dim)
        check_width("key", key, self.kdim)
        check_width("value", value, self.vdim)
        B, S = self._sizes(key, batched)
        check_masks(key_padding_mask, None, key, B, self.num_heads, 0, S, batched)
        if key_padding_mask is not None:
            key, value = blank_padding(key, value, key_padding_mask, self.batch_first)
        k, v, slots = self._append_slots(*self._project_keys(key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        places = self._position_options(slots, key_position=key_position)
        options = {**self._transport_options(), **places, "key_mask": key_mask_of(key_padding_mask, slots)}
        options["initial_potential"] = initial_potential
        return SF.set_transport(k, self._map_values(v), self.references, return_info=return_info, **options)

    def _read(
        self, query: Tensor, memory: SF.SetMemory, query_position: Tensor | None, keys: dict[str, Any], is_causal: bool
    ) -> Tensor:  # fmt: skip
        """The output of `forward` from a memory; `keys` are the arguments that it stands for."""
        given = [name for name, t in keys.items() if t is not None] + ["is_causal"] * bool(is_causal)
        if given:
            raise AttentionInputError(f"memory stands for keys, values and their masks, got {', '.join(given)} as well")
        check_tensors({"query": query}, {"query_position": query_position})
        if query.is_nested:
            position = pad_position("query_position", query_position)
            return nest_like(self._read(pad("query", query)[0], memory, position, {}, False), query)
        batched = check_layout(query, query, query, None, None)
        check_width("query", query, self.embed_dim)
        (q,), transport = self._heads(query, 0, 1), self._transport_options()
        heads = SF.set_read(
            q, memory, self.references, **{name: transport[name] for name in READ}, **self._dropout_options(q.device),
            **self._position_options(0, query_position=query_position),
        )  # fmt: skip
        output = self.out_proj(merge_heads(heads, self.batch_first or not batched))
        return output if batched else output.squeeze(0)

    def _check_call(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[bool, int]:
        """(batched, B) of a call whose shapes and mask dtypes fit; AttentionInputError otherwise."""
        batched = check_layout(query, key, value, key_padding_mask, attn_mask)
        check_width("query", query, self.embed_dim)
        B, L = self._sizes(query, batched)
        if not self._qkv_same_embed_dim or key is not query or value is not query:
            check_pairs(key, value, packed=self._qkv_same_embed_dim)
            check_width("key", key, self.kdim)
            check_width("value", value, self.vdim)
        key_B, S = (B, L) if key is query else self._sizes(key, batched)
        if key_B != B:
            raise AttentionInputError(
                f"query and key must have the same batch size with batch_first={self.batch_first},"
                f" got query {tuple(query.shape)} and key {tuple(key.shape)}"
            )
        if key_padding_mask is not None or attn_mask is not None:
            check_masks(key_padding_mask, attn_mask, key, B, self.num_heads, L, S, batched)
        return batched, B

    def initialize_references(
        self, tokens: Tensor, key_padding_mask: Tensor | None = None, *, value: Tensor | None = None,
        key_position: Tensor | None = None, num_iters: int = 20, init: str = "k-means++",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        """Places the references on sample tokens: spherical k-means, per head, of their projected keys (OTKE's
        unsupervised initialisation).  A few thousand tokens are enough; memory is O(tokens·H·M).

        With value_map="rkhs" the landmarks are placed the same way on the projected values; with position_dim > 0 and
        key_position given, each reference position becomes the mean position of its cluster.

        Args:
            tokens: samples in the layout of forward's key (or nested), with at least num_references not masked.
            key_padding_mask: as in forward; a float mask excludes where its exponential is 0.
            value: samples in the layout of forward's value, only for landmarks; default `tokens`.
            key_position: [S, P] or [B, S, P], as in forward.
            num_iters: k-means iterations.
            init: "k-means++" or "random" (distinct tokens).
            generator: source of randomness, on the tokens' device; default torch's.

        Raises:
            ValueError: shapes, fewer tokens than references, or an unknown init.
        """
        if value is None and self.vdim == self.kdim:
            value = tokens
        other = tokens if value is None else value
        masks = {"key_padding_mask": key_padding_mask}
        check_tensors({"tokens": tokens, "value": other}, {**masks, "key_position": key_position})
        if tokens.is_nested or other.is_nested:
            padded, padding = pad_all({"tokens": tokens, "value": other}, masks, self.batch_first)
            return self.initialize_references(
                padded[0], padding, value=None if value is None else padded[1],
                key_position=pad_position("key_position", key_position),
                num_iters=num_iters, init=init, generator=generator,
            )  # fmt: skip
        check_dense({**masks, "key_position": key_position})
        batched = check_layout(tokens, tokens, other, key_padding_mask, None)
        check_pairs(tokens, other, packed=False)
        check_width("tokens", tokens, self.kdim)
        B, S = self._sizes(tokens, batched)
        check_masks(key_padding_mask, None, tokens, B, self.num_heads, S, S, batched)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        (key,) = self._heads(tokens, 1, 2)
        if value is not None and self.landmarks is not None:
            check_width("value", value, self.vdim)
            (value,) = self._heads(value, 2, 3)
        self._place_references(
            key, value, key_padding_mask, key_position, num_iters=num_iters, init=init, generator=generator
        )
