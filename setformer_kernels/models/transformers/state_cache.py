"""Decoding a converted model with a past of constant size, in place of all its keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .masks import CausalMask, as_options


class StateLayer(CacheLayerMixin):
    """The sums of one layer's keys and values, `state` [B, Hk, M, 2E + 3] (`functional.set_causal`).

    `update` hands back the new keys and values alone, and itself as `set_state` of the keys, which is how attention
    finds the state that goes with them: what calls attention names no cache.
    """

    is_sliding = False
    state: Tensor | None = None
    seen = 0  # tokens, with padding
    unread = False  # whether attention has yet to read what the last update handed back

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized, self.device = True, key_states.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.unread:
            raise ValueError(
                "past_key_values must not be a StateCache for this model: what it does to its keys and values after"
                " they are cached hides the state from attention; DynamicCache works"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen, self.unread = self.seen + key_states.shape[-2], True
        key_states.set_state = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(
        self, transport: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool,
        dropout: float,
    ) -> Tensor:  # fmt: skip
        """o [B, H, L, E] of the new tokens, which join the state; mask: of all tokens so far."""
        if not self.unread:
            raise ValueError("past_key_values must not be a StateCache where layers share their keys: use DynamicCache")
        length = key.shape[2]
        options = as_options(_of_last(mask, length), query.shape[2], length, causal)
        if query.shape[2] != length or options.get("attn_mask") is not None or (
            length > 1 and not options.get("is_causal")
        ):  # fmt: skip
            raise ValueError(
                "attention_mask must be of padding, and attention causal, where past_key_values is a StateCache:"
                f" got {length} keys for {query.shape[2]} queries and"
                f" {'no mask' if mask is None else f'a mask {list(mask.shape)}'}"
            )
        o, self.state = transport.streamed(query, key, value, self.state, options.get("key_mask"), dropout)
        self.unread = False
        return o

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a layer that keeps all keys: layers that do are masked by the same mask."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        if self.state is not None:
            self.state = self.state.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.state is not None:
            self.state = self.state.to(self.device, non_blocking=True)

    def reset(self) -> None:
        self.state, self.seen, self.unread = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError("a state cannot forget its last tokens: what takes tokens back wants a DynamicCache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state[indices.to(self.state.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, 0)


def _of_last(mask: Tensor | None, length: int) -> Tensor | None:
    """The columns of the last keys, of a mask of all."""
    if mask is None or mask.shape[-1] == length:
        return mask
    if isinstance(mask, CausalMask) and mask.intact and mask.shape[2] == length:
        keys, shape = mask.keys, (*mask.shape[:3], length)
        short = None if keys is None else keys[:, -length:]
        return CausalMask.of(shape, mask.device, short, lambda: mask.dense()[..., -length:])
    return mask[..., -length:]


class StateCache(DynamicCache):
    """`model.generate(..., past_key_values=StateCache(model))`: bytes and time a token that no context makes more.

    For decoders whose attention `replace_attention` replaced, with num_iters ≤ 1.  A layer that was left keeps its keys
    and values, as with DynamicCache, and so does one with a sliding window.  What it answers is what DynamicCache
    answers, to rounding.  Greedy, sampled, beams, padding, prefill in pieces and continued generation; not what takes
    tokens back (assisted generation), nor compiled.

    Raises:
        ValueError: where no layer of the model can go by a state, saying why.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("model must be a decoder alone, got one with an encoder: use EncoderDecoderCache")
        super().__init__(config=config)
        modules: list[Any] = [m for m in model.modules() if _is_converted(m)]
        found: dict[int, Any] = {m.layer_idx: m.set_transport for m in modules}
        why = {i: _refusal(transport) for i, transport in found.items()}
        self.streamed = [i for i in sorted(found) if why[i] is None and _keeps_all(self.layers, i)]
        if not self.streamed:
            raise ValueError(f"model must have causal SeT attention that can go by a state, got {_reason(why)}")
        for i in self.streamed:
            self.layers[i] = StateLayer()


def _is_converted(module: nn.Module) -> bool:
    return hasattr(module, "set_transport") and isinstance(getattr(module, "layer_idx", None), int)


def _keeps_all(layers: list[Any], i: int) -> bool:
    """Whether what DynamicCache has for layer i keeps the keys of all tokens, and nothing else."""
    return i < len(layers) and type(layers[i]) is DynamicLayer


def _refusal(transport: Any) -> str | None:
    """Why its attention cannot go by a state."""
    if transport.converges:
        return "transport to convergence"
    return f"num_iters = {transport.num_iters} > 1" if transport.num_iters > 1 else None


def _reason(why: dict[int, str | None]) -> str:
    if not why:
        return "no layer that replace_attention replaced"
    return ", ".join(f"layer {i}: {said or 'a cache of another kind'}" for i, said in sorted(why.items()))
