"""A BERT-shaped encoder whose attention is SeT attention: time and memory linear in the length of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from ..nn.doors import FloatInPython
from ..tracing import leaf
from .layers import Mlp, Recomputing, initialize_weights, own_start, set_attention


def unit_positions(attention_mask: Tensor) -> Tensor:
    """Places of the tokens of attention_mask [B, L] (True = there) on the unit interval: [B, L, 1], float32.

    The i-th of n tokens that are there stands at (i − ½)/n: padding, on either side, moves nothing.
    """
    count = attention_mask.cumsum(1, dtype=torch.float32)
    return ((count - 0.5) / count[:, -1:].clamp(min=1.0)).unsqueeze(-1)


@leaf
def indices(x: Tensor) -> Tensor:
    """0 .. L − 1, on the device of x [B, L, C]."""
    return torch.arange(x.shape[1], device=x.device)


class Embeddings(nn.Module):
    """LN(word + position + token type), with dropout: ids [B, L] -> [B, L, C]."""

    def __init__(
        self, vocab_size: int, width: int, max_positions: int, type_vocab_size: int, pad_token_id: int | None,
        dropout: float, layer_norm_eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.word = nn.Embedding(vocab_size, width, pad_token_id)
        self.position = nn.Embedding(max_positions, width)
        self.token_type = nn.Embedding(type_vocab_size, width)
        self.norm = nn.LayerNorm(width, layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:  # fmt: skip
        word = self.word(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = indices(word)
        kind = self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids)
        return self.dropout(self.norm(word + self.position(position_ids) + kind))


class TextBlock(nn.Module):
    """LN(x + SeT(x)), then LN(x + MLP(x)), as in BERT; x [B, L, C]."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, dropout: float, layer_norm_eps: float,
        position_scale: float | None, attention: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = set_attention(width, num_heads, position_scale, position_dim=1, **attention)
        self.has_positions = position_scale is not None
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(width, layer_norm_eps)
        self.mlp = Mlp(width, hidden, dropout)
        self.norm2 = nn.LayerNorm(width, layer_norm_eps)

    def forward(self, x: Tensor, padding: Tensor | None, position: Tensor) -> Tensor:
        return self.with_weights(x, padding, position, need_weights=False)[0]

    def with_weights(
        self, x: Tensor, padding: Tensor | None, position: Tensor, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, L, C] and, if need_weights, the attention's weights [B, H, L, L]."""
        where = {"query_position": position, "key_position": position} if self.has_positions else {}
        y, weights = self.attention(
            x, x, x, padding, need_weights=need_weights, average_attn_weights=False, **where
        )  # fmt: skip
        x = self.norm1(x + self.dropout(y))
        return self.norm2(x + self.feed_forward(x)), weights

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class TextEncoder(Recomputing, FloatInPython):
    """BERT's encoder with SeT attention; the defaults are the sizes of BERT-base.

    Args:
        vocab_size, width, depth, num_heads, hidden: of tokens, of the model, of blocks, of heads, of the MLP's units.
        num_references: M of every attention.
        max_positions: the longest text there are learned positions for.
        type_vocab_size: of token types (segments).
        pad_token_id: whose embedding is and stays zero.
        dropout: on embeddings and on both branches of a block; dropout of attention goes into `attention`.
        position_scale: τ at the start of the linear positional encoding, tokens on the unit interval; None for none.
        attention: further keyword arguments of every `SeTAttention` (num_iters, epsilon, value_map, dropout, ...).

    Shape:
        input_ids [B, L] -> [B, L, width].  attention_mask [B, L]: nonzero or True where a token is; what the others
        hold changes nothing where a token is.
    """

    block_class: ClassVar[type[TextBlock]] = TextBlock

    def __init__(
        self, vocab_size: int = 30522, width: int = 768, depth: int = 12, num_heads: int = 12, hidden: int = 3072, *,
        num_references: int = 64, max_positions: int = 512, type_vocab_size: int = 2, pad_token_id: int | None = 0,
        dropout: float = 0.1, position_scale: float | None = 4.0, layer_norm_eps: float = 1e-12,
        attention: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"vocab_size": vocab_size, "width": width, "depth": depth, "hidden": hidden,
                 "max_positions": max_positions, "type_vocab_size": type_vocab_size}  # fmt: skip
        vocab_size, width, depth, hidden, max_positions, type_vocab_size = (
            checks.integer(name, size, 1) for name, size in sizes.items()
        )
        pad_token_id = None if pad_token_id is None else checks.integer("pad_token_id", pad_token_id)
        dropout = checks.probability("dropout", dropout)
        layer_norm_eps = checks.number("layer_norm_eps", layer_norm_eps, 0.0)
        position_scale = None if position_scale is None else checks.number("position_scale", position_scale, 0.0)
        self.width, self.max_positions = width, max_positions
        self.embeddings = Embeddings(
            vocab_size, width, max_positions, type_vocab_size, pad_token_id, dropout, layer_norm_eps
        )
        options = {**(attention or {}), "num_references": num_references}
        self.blocks = nn.ModuleList(
            self.block_class(width, num_heads, hidden, dropout, layer_norm_eps, position_scale, options)
            for _ in range(depth)
        )
        self.apply(initialize_weights)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [B, L, width] of input_ids [B, L] or, in their place, inputs_embeds [B, L, width]."""
        x, padding, position = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        for block in self.blocks:
            x = self.run(block, x, padding, position)
        return x

    def embed(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, token_type_ids: Tensor | None,
        position_ids: Tensor | None, inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """What the blocks take: x [B, L, width], padding [B, L] (True = no token) or None, places [B, L, 1]."""
        B, L = check_text(
            self.width, self.max_positions, input_ids, inputs_embeds, position_ids,
            attention_mask=attention_mask, token_type_ids=token_type_ids,
        )  # fmt: skip
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        there = x.new_ones((B, L), dtype=torch.bool) if attention_mask is None else attention_mask != 0
        return x, None if attention_mask is None else ~there, unit_positions(there)


@leaf
def check_text(
    width: int, max_positions: int, input_ids: Tensor | None, inputs_embeds: Tensor | None,
    position_ids: Tensor | None, **others: Tensor | None,
) -> tuple[int, int]:  # fmt: skip
    """(B, L) of inputs of a `TextEncoder` whose shapes fit; others: by name, tensors [B, L] or None."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass either input_ids or inputs_embeds: got both or neither")
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, L], got {list(input_ids.shape)}")
        B, L = input_ids.shape
    else:
        assert inputs_embeds is not None
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width:
            raise ValueError(f"inputs_embeds must be [B, L, {width}], got {list(inputs_embeds.shape)}")
        B, L = inputs_embeds.shape[:2]
    if max_positions < L:
        raise ValueError(f"max_positions={max_positions} is less than the length of the text, {L}")
    for name, tensor in others.items():
        if tensor is not None and tuple(tensor.shape) != (B, L):
            raise ValueError(f"{name} must be {[B, L]}, as the text, got {list(tensor.shape)}")
    if position_ids is not None and tuple(position_ids.shape) not in ((L,), (1, L), (B, L)):
        raise ValueError(f"position_ids must be {[L]} or {[B, L]}, got {list(position_ids.shape)}")
    return B, L


class Pooler(nn.Module):
    """tanh(W h₁ + b): the first token of hidden [B, L, C], made ready to stand for the text: [B, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.apply(initialize_weights)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))


class TokenHead(nn.Module):
    """Logits [..., num_labels] of hidden [..., C]: one a token, or one a text after `Pooler`."""

    def __init__(self, width: int, num_labels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_labels)
        self.apply(initialize_weights)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(self.dropout(hidden))


class SequenceHead(nn.Sequential):
    """Logits [B, num_labels] of hidden [B, L, C]."""

    def __init__(self, width: int, num_labels: int, dropout: float = 0.1) -> None:
        super().__init__(Pooler(width), TokenHead(width, num_labels, dropout))


class MaskedLMHead(nn.Module):
    """Logits [..., vocab_size] of hidden [..., C]; `tie` makes the last weight that of the word embeddings.

    padding_idx: the word whose row of the last weight is zero at the start, as it is in word embeddings.
    """

    def __init__(
        self, width: int, vocab_size: int, layer_norm_eps: float = 1e-12, padding_idx: int | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, layer_norm_eps))
        self.decoder = nn.Linear(width, vocab_size)
        vars(self.decoder)["padding_idx"] = padding_idx
        self.apply(initialize_weights)

    def tie(self, encoder: TextEncoder) -> MaskedLMHead:
        word = encoder.embeddings.word
        self.decoder.weight = word.weight
        vars(self.decoder)["padding_idx"] = word.padding_idx
        own_start(self.decoder)
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


class TextModel(FloatInPython):
    """An encoder and a head: logits of a text, of its tokens, or of the words behind its masked tokens."""

    def __init__(self, encoder: TextEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Arguments as `TextEncoder.forward`."""
        return self.head(self.encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds))
