"""Small inputs for any model of transformers, by the names of its arguments: candidates, of which one has to fit."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

BATCH, LENGTH = 2, 10


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the model's forward, the likeliest first."""
    names = list(inspect.signature(model.forward).parameters)
    found = _find(model.config)
    text = _text(names)
    if "decoder_input_ids" in names:
        text["decoder_input_ids"] = _words()
    if "bbox" in names:
        text["bbox"] = torch.randint(0, 50, (BATCH, LENGTH, 4)).sort(-1).values
    own = list(_of_modality(names, found))
    decoder = {k: v for k, v in text.items() if k.startswith("decoder")}
    if "input_ids" in names:
        for x in own:
            yield {**text, **x}
        for n in found("num_codebooks")[:1]:  # a row a codebook
            last = "decoder_input_ids" if "decoder_input_ids" in names else "input_ids"
            yield {**text, last: _words().repeat_interleave(n, 0)}
        yield text
        if "use_cache" in names:
            yield {**text, "use_cache": False}
        for n in found("num_codebooks", "num_channels", "num_quantizers")[:1]:
            yield {**text, "input_ids": torch.randint(3, 30, (BATCH, LENGTH, n))}
    for x in own:
        yield {**x, **decoder}
    if "input_ids" not in names and "inputs_embeds" in names:
        for width in found("hidden_size", "d_model", "embed_dim"):
            embeds = {"inputs_embeds": torch.randn(BATCH, LENGTH, width), **_mask(names, LENGTH)}
            yield embeds
            yield {**embeds, **decoder}
    first = names[0]
    if first in ("hidden_states", "x", "inputs", "input", "query_embeds"):
        for width in found("hidden_size", "d_model", "embed_dim"):
            yield {first: torch.randn(BATCH, LENGTH, width)}


def _words() -> Tensor:
    return torch.randint(3, 30, (BATCH, LENGTH))


def _mask(names: list[str], length: int) -> dict[str, Tensor]:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, length - 3 :] = 0
    return {"attention_mask": mask} if "attention_mask" in names else {}


def _text(names: list[str]) -> dict[str, Any]:
    return {"input_ids": _words(), **_mask(names, LENGTH)}


def _find(config: PretrainedConfig) -> Any:
    """What looks up numbers by their names in a configuration and its parts."""
    parts, todo = [], [config]
    while todo:
        parts.append(todo.pop(0))
        todo += [value for value in vars(parts[-1]).values() if isinstance(value, PretrainedConfig)]

    def found(*names: str) -> list[Any]:
        values = [getattr(part, name, None) for name in names for part in parts]
        return list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in values if v))

    return found


def _of_modality(names: list[str], found: Any) -> Iterator[dict[str, Any]]:
    """Inputs that are not words."""
    yield from _images(names, found)
    bins = found(
        "num_mel_bins",
        "input_feat_per_channel",
        "n_mels",
        "feature_size",
        "input_dim",
        "feature_projection_input_dim",
        "mel_dim",
    ) or [80]
    long = found("max_source_positions")
    for name in ("input_features", "input_values", "audio_features", "input_audio", "spectrogram"):
        if name not in names:
            continue
        if name == "input_values" or name == "input_audio":
            yield {name: torch.randn(BATCH, 4000)}
            yield {name: torch.randn(BATCH, 1, 4000)}
        for n in bins[:2]:
            for frames in [2 * long[0], long[0]] if long else [40]:
                for mask in ("input_features_mask", "attention_mask", ""):
                    seen = {mask: torch.ones(BATCH, frames, dtype=torch.long)} if mask in names else {}
                    if seen or not mask:
                        yield {name: torch.randn(BATCH, n, frames), **seen}
                        yield {name: torch.randn(BATCH, frames, n), **seen}
            for frames in found("max_length", "spec_size")[:2]:
                yield {name: torch.randn(BATCH, frames, n)}
                yield {name: torch.randn(BATCH, 1, frames, n)}
    if "audio_codes" in names:
        yield {
            "audio_codes": torch.randint(0, 90, (BATCH, LENGTH, (found("num_codebooks", "num_quantizers") or [4])[0]))
        }
    if "past_values" in names:
        yield from _series(names, found)


def _images(names: list[str], found: Any) -> Iterator[dict[str, Any]]:
    sizes = [(s, s) if isinstance(s, int) else tuple(s[:2]) for s in found("image_size", "img_size", "input_size")]
    channels = found("num_channels", "in_channels", "in_chans")
    channels = [c for c in channels if isinstance(c, int)] or [3]
    frames = found("num_frames", "frames_per_clip", "tubelet_size")
    name = next((n for n in ("pixel_values", "pixel_values_videos", "pixel_values_images") if n in names), None)
    if name is not None:
        for size in list(dict.fromkeys([*sizes, (64, 64), (224, 224)])):
            yield {name: torch.randn(BATCH, channels[0], *size)}
            for f in frames[:1]:
                if isinstance(f, int):
                    yield {name: torch.randn(BATCH, f, channels[0], *size)}
    for grid in ("grid_thw", "image_grid_thw"):
        if grid in names:
            p, t = found("patch_size")[0], (found("temporal_patch_size") or [1])[0]
            rows = torch.randn(2 * 16, channels[0] * t * p * p)
            thw = torch.tensor([[1, 4, 4], [1, 4, 4]])
            first = names[0] if grid == "grid_thw" else "pixel_values"
            yield {first: rows, grid: thw}
            yield {first: rows.view(len(rows), -1, p, p), grid: thw}


def _series(names: list[str], found: Any) -> Iterator[dict[str, Any]]:
    context = (found("context_length", "prediction_length") or [32])[0]
    for n in found("num_input_channels") or [1]:
        yield {"past_values": torch.randn(BATCH, context, n)}
    yield {"past_values": torch.randn(BATCH, context)}
    lags = max((found("lags_sequence") or [(1, 2, 3, 4, 5, 6, 7)])[0])
    whole, ahead = context + lags, (found("prediction_length") or [context])[0]
    yield {
        "past_values": torch.randn(BATCH, whole), "past_time_features": torch.randn(BATCH, whole, 0),
        "past_observed_mask": torch.ones(BATCH, whole), "future_values": torch.randn(BATCH, ahead),
        "future_time_features": torch.randn(BATCH, ahead, 0),
    }  # fmt: skip
