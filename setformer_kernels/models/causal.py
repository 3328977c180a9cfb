"""A decoder of text whose attention is causal SeT attention that forgets: its past is a state of constant size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .. import functional as SF
from ..nn.contract import sizes
from ..nn.doors import FloatInPython
from ..nn.heads import COLUMNS, ROWS
from ..nn.projections import merge_heads, split_heads
from ..nn.shards import whole_only
from ..nn.writing import redraw
from ..problem import compute_dtype
from ..sharding import sharded
from .layers import Mlp, Recomputing, initialize_weights
from .transport import OWN_DEFAULTS, SetTransport

# How many tokens heads remember at the start, 1/e of a key being left after as many: from words to pages.
SHORTEST, LONGEST = 8.0, 512.0


class Past(NamedTuple):
    """What an attention keeps of the tokens it has seen; None before the first, and where there is no convolution."""

    inputs: Tensor | None = None  # [B, 3·width, W − 1], the last inputs of the convolution
    sums: Tensor | None = None  # [B, H, M, 2E + 3], the state of `functional.set_causal`, float32 or better


class CausalTransport(SetTransport):
    """q, k [B, H, L, D], v [B, H, L, E], log gates [B, H, L] ≤ 0 -> o [B, H, L, E], and the state if `need_state`."""

    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, log_decay: Tensor | None = None,
        state: Tensor | None = None, need_state: bool = False, *,
        run: Callable[[Tensor, Tensor, Any], Any] | None = None,
    ) -> Any:  # fmt: skip
        """Without gradients, one token on a state writes the new one into it.  run: as in `SetTransport`."""
        if run is not None:
            return run(q, k, v)
        v, options = self._map_values(v), self._transport_options()
        if q.shape[2] != 1 or state is None or torch.is_grad_enabled() or self.cp_context is not None:
            return SF.set_causal(
                q, k, v, self.references, initial_state=state, output_final_state=need_state, log_decay=log_decay,
                key_mask=key_mask, **options,
            )  # fmt: skip
        mask, decay = (None if t is None else t[..., 0] for t in (key_mask, log_decay))
        o = SF.set_step(
            state, q[:, :, 0], k[:, :, 0], v[:, :, 0], self.references, log_decay=decay, key_mask=mask, **options
        )
        return o.unsqueeze(2), state


class ShortConvolution(nn.Conv1d):
    """A channel's sum over the last W tokens up to each: y_i = Σ_t w_t x_{i − W + 1 + t}, tokens before the first zero.

    Shape:
        x [B, L, C], before [B, C, W − 1] or None (zeros) -> y [B, L, C], and inputs of which the last W − 1 are those
        up to the last token, [B, C, W − 1 + L]; over ranks those of the whole sequence, None unless `wanted`.
    """

    cp_context: Any = None  # as a reference set has it

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, before: Tensor | None = None, wanted: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        x, reach = x.mT, self.kernel_size[0] - 1
        if self.cp_context is not None:
            return self._over_ranks(*sharded(self.cp_context).windows(x, reach, before, wanted))
        x = F.pad(x, (reach, 0)) if before is None else torch.cat((before.to(x.dtype), x), -1)
        return self._convolved(x).mT, x

    def _convolved(self, x: Tensor) -> Tensor:
        """x [B, C, W − 1 + L] -> [B, C, L].  Where L = 0 every parameter has a gradient none the less."""
        reach = self.kernel_size[0] - 1
        return x[..., reach:] + 0 * self.weight.sum() if x.shape[-1] <= reach else super().forward(x)

    def _over_ranks(self, windows: list[Tensor], last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.cat([self._convolved(x) for x in windows], -1).mT, last


def memories(bias: Tensor) -> None:
    """Biases [H] of gates σ(b) = 1 − 1/n, n from SHORTEST to LONGEST in equal ratios."""
    tokens = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), bias.shape[0], device=bias.device)
    bias.copy_((tokens - 1.0).log())


class Gates(nn.Module):
    """Log gates log σ(⟨w, x_i⟩ + b) of each head, float32 or better: x [B, L, width] -> [B, H, L]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width))
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        redraw(self, {"weight": nn.init.zeros_, "bias": memories})

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.weight, self.bias)
        return F.logsigmoid(logits.to(compute_dtype(logits.dtype))).mT


class CausalAttention(nn.Module):
    """SeT attention to the tokens before, of which each head's gate lets it forget; T ≤ 1.

    q, k, v = conv(W_in x) and the log gates of `Gates` through `functional.set_causal`.

    Args:
        width, num_heads: of the tokens, and of heads.
        conv_width: W, tokens that the convolution of q, k and v reaches over; 1: none.
        gate: whether heads forget.  Without gates every head is the mean over all of the past.
        options: of `SeTAttention` beyond those of `nn.MultiheadAttention`, without positions.

    Shape:
        x [B, L, width], lengths [B] (of a row the first are there; None: all) -> [B, L, width], and the `Past` after
        the tokens that are there, where it is asked for.
    """

    of_heads: ClassVar[dict[str, int]] = {"in_proj": 3, "conv": 3, "gate": ROWS, "transport": ROWS, "out_proj": COLUMNS}

    def __init__(
        self, width: int, num_heads: int, *, conv_width: int = 4, gate: bool = True, **options: Any
    ) -> None:  # fmt: skip
        super().__init__()
        width, num_heads, _, _ = sizes(width, num_heads)
        conv_width = checks.integer("conv_width", conv_width, 1)
        if checks.iterations(options.get("num_iters", OWN_DEFAULTS["num_iters"])) > 1:
            raise ValueError(f"num_iters must be 0 or 1 in a causal model, got {options['num_iters']}")
        if options.get("position_dim"):
            raise ValueError(f"position_dim must be 0 in a causal model, got {options['position_dim']}")
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.conv = ShortConvolution(3 * width, conv_width) if conv_width > 1 else None
        self.gate = Gates(width, num_heads) if checks.flag("gate", gate) else None
        self.transport = CausalTransport(num_heads, width // num_heads, self.in_proj.weight, options)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None, need_past: bool = False
    ) -> tuple[Tensor, Past | None]:
        before = Past() if past is None else past
        qkv, inputs = self.in_proj(x), None
        if self.conv is not None:
            qkv, inputs = self.conv(qkv, before.inputs, need_past)
        q, k, v = (split_heads(t, self.num_heads, True) for t in qkv.chunk(3, -1))
        decay = None if self.gate is None else self.gate(x)
        there = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
        o, sums = self.transport(q, k, v, there, decay, before.sums, need_past)
        y = self.out_proj(merge_heads(o, True))
        return y, Past(self._kept(inputs, lengths), sums) if need_past else None

    def _kept(self, inputs: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """The last W − 1 of inputs [B, C, W − 1 + L] up to the last token that is there."""
        if inputs is None:
            return None
        assert self.conv is not None
        reach = self.conv.kernel_size[0] - 1
        if lengths is None:
            return inputs[..., inputs.shape[-1] - reach :].contiguous()
        places = lengths.unsqueeze(1) + torch.arange(reach, device=inputs.device)  # [B, W − 1]
        return inputs.gather(-1, places.unsqueeze(1).expand(-1, inputs.shape[1], -1))


class CausalBlock(nn.Module):
    """x + SeT(LN(x)), then that + MLP(LN(that)); arguments and shapes of `CausalAttention.forward`."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, dropout: float, layer_norm_eps: float,
        attention: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(width, layer_norm_eps)
        self.attention = CausalAttention(width, num_heads, **attention)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width, layer_norm_eps)
        self.mlp = Mlp(width, hidden, dropout)

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None, need_past: bool = False
    ) -> tuple[Tensor, Past | None]:
        y, after = self.attention(self.norm1(x), lengths, past, need_past)
        x = x + self.dropout(y)
        return x + self.mlp(self.norm2(x)), after


class Compaction:
    """Tokens that are there [B, L] (None: all) brought to the front of their rows, in their order, and back.

    A causal model then never sees padding: what is not there stands behind all that is, wherever it stood before.
    """

    def __init__(self, there: Tensor | None) -> None:
        self.lengths = None if there is None else there.sum(1)
        self.order = None
        if there is not None and there.shape[1] > 1:
            self.order = there.logical_not().to(torch.uint8).argsort(stable=True, dim=1)

    def front(self, x: Tensor) -> Tensor:
        """x [B, L, C], each row in the order of the tokens that are there."""
        return x if self.order is None else x.gather(1, self.order.unsqueeze(-1).expand_as(x))

    def back(self, x: Tensor) -> Tensor:
        """What `front` undid."""
        return x if self.order is None else torch.zeros_like(x).scatter(1, self.order.unsqueeze(-1).expand_as(x), x)


class CausalDecoder(Recomputing, FloatInPython):
    """Word embeddings, pre-norm blocks, a norm: a language model without its head.  There are no positions: order is
    known by the convolutions and the gates, and texts may be of any length.

    Args:
        vocab_size, width, depth, num_heads, hidden: of tokens, of the model, of blocks, of heads, of the MLP's units.
        num_references: M of every attention.
        conv_width, gate: of `CausalAttention`.
        pad_token_id: whose embedding is and stays zero.
        dropout: on embeddings and on both branches of a block.
        attention: further keyword arguments of every `CausalAttention` (num_iters, epsilon, value_map, ...).

    Shape:
        input_ids [B, L] -> [B, L, width].  attention_mask [B, L]: nonzero or True where a token is, in any places; a
        row's tokens give what they give alone.  past: one `Past` a block, as an earlier call returned it.
    """

    block_class: ClassVar[type[CausalBlock]] = CausalBlock

    def __init__(
        self, vocab_size: int = 50257, width: int = 768, depth: int = 12, num_heads: int = 12, hidden: int = 3072, *,
        num_references: int = 64, conv_width: int = 4, gate: bool = True, pad_token_id: int | None = None,
        dropout: float = 0.0, layer_norm_eps: float = 1e-5, attention: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        counts = {"vocab_size": vocab_size, "width": width, "depth": depth, "hidden": hidden}
        vocab_size, width, depth, hidden = (checks.integer(name, size, 1) for name, size in counts.items())
        pad_token_id = None if pad_token_id is None else checks.integer("pad_token_id", pad_token_id)
        dropout = checks.probability("dropout", dropout)
        layer_norm_eps = checks.number("layer_norm_eps", layer_norm_eps, 0.0)
        self.width = width
        self.word = nn.Embedding(vocab_size, width, pad_token_id)
        self.dropout = nn.Dropout(dropout)
        own = {**(attention or {}), "num_references": num_references, "conv_width": conv_width, "gate": gate}
        self.blocks = nn.ModuleList(
            self.block_class(width, num_heads, hidden, dropout, layer_norm_eps, own) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, layer_norm_eps)
        self.apply(initialize_weights)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, past: Sequence[Past] | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [B, L, width] of input_ids [B, L] or, in their place, inputs_embeds [B, L, width]."""
        return self.with_past(input_ids, attention_mask, inputs_embeds, past, need_past=False)[0]

    def with_past(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, past: Sequence[Past] | None = None, need_past: bool = True,
        note: Callable[[Tensor], Any] | None = None,
    ) -> tuple[Tensor, list[Past]]:  # fmt: skip
        """Also the `Past` of every block after these tokens.  Without gradients, a single token's call writes over the
        sums in `past`: clone them to go on from one past twice.  note is called with what enters each block."""
        self.refuse_padding(attention_mask)
        x = self.embed(input_ids, attention_mask, inputs_embeds)
        if past is not None and len(past) != len(self.blocks):
            raise ValueError(f"past must have one Past a block, {len(self.blocks)}, got {len(past)}")
        tokens = Compaction(None if attention_mask is None else attention_mask != 0)
        x, after = tokens.front(x), []
        for i, block in enumerate(self.blocks):
            if note is not None:
                note(seen := tokens.back(x))
                x = tokens.front(seen)
            x, kept = self.run(block, x, tokens.lengths, None if past is None else past[i], need_past)
            after.append(kept)
        x = tokens.back(x)
        return self.norm(x), after if need_past else []

    def refuse_padding(self, attention_mask: Tensor | None) -> None:
        """ValueError for a mask over ranks, where a convolution takes the tokens before a shard as they stand."""
        contexts = [module.cp_context for module in self.modules() if isinstance(module, ShortConvolution)]
        whole_only(contexts[0] if contexts else None, attention_mask=attention_mask is not None)

    def embed(self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """What enters the first block, [B, L, width], of checked inputs."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds: got both or neither")
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, L], got {list(input_ids.shape)}")
        x = self.word(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3 or x.shape[2] != self.width:
            raise ValueError(f"inputs_embeds must be [B, L, {self.width}], got {list(x.shape)}")
        if attention_mask is not None and attention_mask.shape != x.shape[:2]:
            raise ValueError(
                f"attention_mask must be {list(x.shape[:2])}, as the text, got {list(attention_mask.shape)}"
            )
        return self.dropout(x)


class CausalLM(FloatInPython):
    """A decoder whose word embeddings are also its head: logits [B, L, vocab_size] of input_ids [B, L]."""

    def __init__(self, decoder: CausalDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Arguments as `CausalDecoder.forward`."""
        return F.linear(self.decoder(input_ids, attention_mask, inputs_embeds), self.decoder.word.weight)

    def with_past(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past: Sequence[Past] | None = None
    ) -> tuple[Tensor, list[Past]]:
        """Logits [B, 1, vocab_size] of the last place, and the past for the next call; as `CausalDecoder.with_past`."""
        hidden, after = self.decoder.with_past(input_ids, attention_mask, None, past)
        return F.linear(hidden[:, -1:], self.decoder.word.weight), after
