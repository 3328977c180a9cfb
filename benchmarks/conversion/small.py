"""Small configurations of any model of transformers, by what their numbers are called."""

from __future__ import annotations

import re
from typing import Any

from transformers import PretrainedConfig

VOCABULARY, WIDTH, HEADS, HEAD_DIM = 160, 64, 4, 16
FIRST_TOKEN = 100  # special tokens beyond the vocabulary are numbered from here on

# By the end of a name, the first that fits; a rule makes a number smaller, never greater, unless it is a set.
COUNTS: tuple[tuple[str, int], ...] = (
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_hash_layers", 0),
    (r"first_k_dense_replace|n_shared_experts|topk_group|n_group|num_expert_group|moe_layer_start_index", 1),
    (r"max_window_layers|num_feature_levels|fpn_top_down_levels|num_feat_extract_layers", 10**9),
    (r"hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|attention_layers|depth|_layers|^layers", 2),
    (r"experts_per_tok(en)?|top_?k_experts|moe_top_?k|moe_k|num_selected_experts", 2),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"vocab_size(_per_layer_input)?", VOCABULARY),
    (r"codebook_size", 128),
    (r"sliding_window|sliding_window_size|local_attention", 6),
    (r"max_source_positions", 40),
    (r"num_queries|num_latents|n_latents", 8),
)
WIDTHS: tuple[tuple[str, int], ...] = (
    (r"num_key_value_heads|n_kv_heads|num_kv_heads|num_global_key_value_heads", 2),
    (r"attention_heads|num_heads|n_heads?|_heads|attention_heads_per_layer|^heads", HEADS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (
        r"head_dim|d_kv|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|key_value_proj_dim|index_head_dim|dim_head",
        HEAD_DIM,
    ),
    (r"rotary_dim", HEAD_DIM),
    (r"lora_rank", 16),
    (r"intermediate_size|intermediate_dim|ffn_dim|mlp_dim|d_ff|n_inner|ffn_hidden_size|feedforward_dim", WIDTH),
    (
        r"hidden_size|d_model|embed_dim|n_embd|hidden_dim|embedding_size|embedding_dim|projection_dim|emb_dim|^dim",
        WIDTH,
    ),
    (r"output_dim|text_dim|proj_dim|word_embed_proj_dim|encoder_width|decoder_width|n_embed|fpn_hidden_size", WIDTH),
)
# What some configurations leave open, and models do not do without.
OPEN = {
    "vocab_size": VOCABULARY, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "prediction_length": 8, "max_position_embeddings": 64,
    "contrastive_hidden_size": WIDTH, "context_length": 16, "head_dim": HEAD_DIM,
}  # fmt: skip


def small(config: PretrainedConfig, widths: bool = True, images: bool = True) -> PretrainedConfig:
    """config, in place: two layers or one of each kind, few words and experts; narrow where `widths`, on small images
    where `images`."""
    _shrink(config, COUNTS + (WIDTHS if widths else ()), images, {})
    return config


def _shrink(config: PretrainedConfig, rules: tuple[tuple[str, int], ...], images: bool, tokens: dict[str, int]) -> None:
    layers = next(
        (n for n in ("num_hidden_layers", "n_layer", "num_layers") if _integer(getattr(config, n, None))), None
    )
    before = getattr(config, layers) if layers else 0
    chosen = [] if hasattr(config, "depths") else _chosen(config, before)  # lists of stages, not of layers
    heads, groups = vars(config).get("num_attention_heads", 0), vars(config).get("num_key_value_heads")
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, rules, images, tokens)
        elif name == "initializer_range" and isinstance(value, float):
            _set(config, name, max(value, 0.02))
        elif _integer(value):
            _set(config, name, _smaller(name, value, rules, tokens))
        elif name in ("depths", "blocks_per_stage") and isinstance(value, (list, tuple)):
            _set(config, name, [1 for _ in value])
        elif isinstance(value, (list, tuple)) and len(value) == before > 0 and chosen:
            _set(config, name, [value[i] for i in chosen])
        elif value is None and name in OPEN and (name != "head_dim" or "hidden_size" in vars(config)):
            _set(config, name, OPEN[name])
    if rules[-len(WIDTHS) :] == WIDTHS:
        _narrow_rope(config)
    if vars(config).get("num_key_value_heads") == 2 and heads == groups and any(r[1] == HEADS for r in rules):
        _set(config, "num_key_value_heads", HEADS)  # as many as queries have, where it was so
    if layers and chosen:
        _set(config, layers, len(chosen))
    if chosen and "stage_names" in vars(config):  # of a backbone of layers: the last one is given out
        _set(config, "stage_names", ["stem", *(f"stage{i + 1}" for i in range(len(chosen)))])
        _set(config, "_out_features", [f"stage{len(chosen)}"])
        _set(config, "_out_indices", [len(chosen)])
    if images:
        _small_images(config)


def _narrow_rope(config: PretrainedConfig) -> None:
    """Positions in time, height and width share the frequencies of a head."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and ("mrope_section" in rope or re.search("glm|qwen|vl", config.model_type)):
        half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
        part = half * 3 // 8
        _set(config, "rope_parameters", {**rope, "mrope_section": [half - 2 * part, part, part]})


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _set(config: PretrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a configuration may refuse what does not fit what it has; the model then says so or does not
        config.__dict__[name] = value


def _chosen(config: PretrainedConfig, layers: int) -> list[int]:
    """The layers that stay: the first of each kind, two at least."""
    if layers <= 2:
        return []
    lists = [v for v in vars(config).values() if isinstance(v, (list, tuple)) and len(v) == layers]
    kinds = [tuple(str(v[i]) for v in lists if isinstance(v[0], str)) for i in range(layers)]
    firsts = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    return firsts if len(firsts) > 1 else [0, 1]


def _smaller(name: str, value: int, rules: tuple[tuple[str, int], ...], tokens: dict[str, int]) -> int:
    if re.search(r"token_(id|index)s?$", name):
        if value < FIRST_TOKEN:
            return value
        return tokens.setdefault(name, FIRST_TOKEN + len(tokens))
    for pattern, most in rules:
        if re.search(f"({pattern})$", name):
            return min(value, most)
    return value


def _small_images(config: PretrainedConfig) -> None:
    patch, size = getattr(config, "patch_size", None), getattr(config, "image_size", None)
    if _integer(patch) and patch > 1:
        if _integer(size) and size > 4 * patch:
            _set(config, "image_size", 4 * patch)
        elif isinstance(size, (list, tuple)) and len(size) == 2:
            _set(config, "image_size", [4 * patch, 4 * patch])
