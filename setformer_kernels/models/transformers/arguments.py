"""Arguments that transformers passes to every model: what a SeTformer answers, and what it has to refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# `output_hidden_states` as transformers takes it: all, none, or those of these places.
Asked = bool | int | list[int] | None

DECODER = "SeTformer's models are encoders, without a cache and without cross-attention"
PACKED = "SeTformer's models take padded batches, not packed ones"
# By name: why an argument that transformers knows has no meaning here.  Callers hand them on as None or False.
ABSENT = {
    **dict.fromkeys(("past_key_values", "use_cache", "cache_position", "logits_to_keep", "is_causal"), DECODER),
    **dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask"), DECODER),
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"), PACKED),
    "head_mask": "SeT attention has no mask of heads",
    "bool_masked_pos": "SeTformer has no mask token",
    "num_items_in_batch": "only a model with labels has a loss",
    "output_router_logits": "SeTformer has no experts",
}
UNPLACED = "SeTformer's decoder has no positions: convolutions and gates know the order"
# The same of the causal language model.
ABSENT_CAUSAL = {
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"), PACKED),
    **dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask"), "SeTformer's decoder has no cross-attention"),
    **dict.fromkeys(("position_ids", "cache_position"), UNPLACED),
    "token_type_ids": "SeTformer's decoder has no token types",
    "output_attentions": "the weights of a scan are not computed (L squared numbers a head)",
    **{name: ABSENT[name] for name in ("head_mask", "output_router_logits")},
}


def refuse_arguments(model: object, arguments: Mapping[str, Any], absent: Mapping[str, str] = ABSENT) -> None:
    """Raises for keyword arguments that would change nothing."""
    for name, value in arguments.items():
        if name not in absent:
            raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}")
        if value is not None and value is not False:
            raise ValueError(f"{name} must be None: {absent[name]}, got {type(value).__name__}")


def either(argument: Any, config: object, name: str) -> Any:
    """The argument where one was given, else the configuration's."""
    return getattr(config, name, None) if argument is None else argument


def chosen_states(states: Sequence[Tensor], asked: Asked) -> tuple[Tensor | None, ...] | None:
    """All states, None, or a tuple as long with None at the places that were not asked for."""
    if not asked:
        return None
    if isinstance(asked, bool):
        return tuple(states)
    places = [asked] if isinstance(asked, int) else asked
    kept = {place % len(states) for place in places if -len(states) <= place < len(states)}
    return tuple(state if i in kept else None for i, state in enumerate(states))
