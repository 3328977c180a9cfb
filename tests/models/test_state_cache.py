"""Converted decoders with a state in place of keys and values: what DynamicCache answers, in constant memory."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor

from setformer_kernels.models import replace_attention
from setformer_kernels.models.transformers import StateCache
from setformer_kernels.models.transformers.causal import CACHE
from setformer_kernels.models.transformers.state_cache import StateLayer

OWN: dict[str, Any] = {"num_references": 4, "epsilon": 0.2}
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def decoder(kind: str = "llama", skip: Any = None, own: dict[str, Any] | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    more = {"num_key_value_heads": 2, "intermediate_size": 48}
    sizes = {
        "llama": more, "qwen3": {**more, "head_dim": 8}, "gpt2": {},
        "gemma2": {**more, "head_dim": 8, "sliding_window": 5}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "doge": {**more, "head_dim": 8},
    }[kind]  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    replace_attention(model, skip=skip, **{**OWN, **(own or {})})
    return model


def words(*shape: int) -> Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(1))


def cached(model: Any, pieces: list[Tensor], cache: Any, **told: Any) -> Tensor:
    return torch.cat([model(piece, **{CACHE: cache}, **told).logits for piece in pieces], 1)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2", "opt"])
@torch.no_grad()
def test_pieces_give_what_the_whole_gives(kind: str) -> None:
    model, x = decoder(kind), words(2, 13)
    whole, cache = model(x).logits, StateCache(model)
    assert cache.streamed == ([1] if kind == "gemma2" else [0, 1])  # its other layer has a sliding window
    torch.testing.assert_close(cached(model, [*x.split([4, 1, 1, 5, 2], 1)], cache), whole, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize("own", [{"num_iters": 0}, {"value_map": "rkhs"}, {"learn_epsilon": True}], ids=str)
@torch.no_grad()
def test_options_of_attention(own: dict[str, Any]) -> None:
    model, x = decoder(own=own), words(1, 9)
    got = cached(model, [*x.split([3, 1, 1, 4], 1)], StateCache(model))
    torch.testing.assert_close(got, model(x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=str,
)
@torch.no_grad()
def test_generate(how: dict[str, Any]) -> None:
    model, x = decoder(), words(2, 7)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    told = {**GREEDY, "attention_mask": mask, **how}
    torch.manual_seed(3)
    wanted = model.generate(x, **{CACHE: transformers.DynamicCache(config=model.config)}, **told)
    torch.manual_seed(3)
    assert torch.equal(model.generate(x, **{CACHE: StateCache(model)}, **told), wanted)


@torch.no_grad()
def test_generation_goes_on() -> None:
    model, x = decoder(), words(1, 5)
    cache = StateCache(model)
    first = model.generate(x, **{CACHE: cache}, **GREEDY)
    more = torch.cat((first, words(1, 4)), 1)
    got = model.generate(more, **{CACHE: cache}, **GREEDY)
    assert torch.equal(got, model.generate(more, **GREEDY))


@torch.no_grad()
def test_a_layer_that_was_left_keeps_its_keys() -> None:
    model, x = decoder(skip=lambda name, _: "layers.0" in name), words(2, 8)
    mask = torch.ones_like(x)
    mask[1, :2] = 0
    cache = StateCache(model)
    assert cache.streamed == [1]
    told = {**GREEDY, "attention_mask": mask}
    assert torch.equal(model.generate(x, **{CACHE: cache}, **told), model.generate(x, use_cache=False, **told))
    assert cache.layers[0].keys.shape[2] == 13


@torch.no_grad()
def test_bytes_do_not_grow() -> None:
    model, sizes = decoder(), []
    for length in (3, 40):
        cache = StateCache(model)
        model(words(1, length), **{CACHE: cache})
        sizes.append([layer.state.nbytes for layer in cache.layers])
    assert sizes[0] == sizes[1] == [2 * 4 * (2 * 8 + 3) * 4] * 2


def test_gradients_go_through_what_is_kept() -> None:
    model, x = decoder(), words(2, 9)
    wanted = torch.autograd.grad(model(x).logits[:, -1].sum(), model.model.embed_tokens.weight)[0]
    pieces = cached(model, [*x.split([4, 1, 4], 1)], StateCache(model))
    got = torch.autograd.grad(pieces[:, -1].sum(), model.model.embed_tokens.weight)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_rows_are_chosen_and_repeated_and_forgotten() -> None:
    model, x = decoder(), words(2, 6)
    cache = StateCache(model)
    model(x[:, :5], **{CACHE: cache})
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    got = model(x[[1, 0], 5:], **{CACHE: cache}).logits
    torch.testing.assert_close(got, model(x[[1, 0]]).logits[:, 5:], rtol=1e-4, atol=1e-5)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(x, **{CACHE: cache}).logits, model(x).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_state_cannot_answer() -> None:
    with pytest.raises(ValueError, match="num_iters = 3 > 1"):
        StateCache(decoder(own={"num_iters": 3}))
    with pytest.raises(ValueError, match="to convergence"):
        StateCache(decoder(own={"tol": 1e-3}))
    with pytest.raises(ValueError, match="no layer that replace_attention replaced"):
        StateCache(decoder(skip=lambda name, _: True))
    with pytest.raises(TypeError, match="model must be one of transformers, got Linear"):
        StateCache(torch.nn.Linear(2, 2))
    model, x = decoder(), words(1, 5)
    cache = StateCache(model)
    with pytest.raises(ValueError, match="attention_mask must be of padding"):
        model(x, attention_mask=torch.rand(1, 1, 5, 5), **{CACHE: cache})
    model(x, **{CACHE: StateCache(model)})
    for named in ({"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)}, {"output_attentions": True}):
        with pytest.raises(ValueError, match=f"must be a DynamicCache for {next(iter(named))}"):
            model(x, **{CACHE: StateCache(model)}, **named)
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.crop(-1)


@torch.no_grad()
def test_masks_of_one_query_are_told_from_padding() -> None:
    """Such a mask can hide what the state already holds: a window, as one that is written out here."""
    model, x = decoder(), words(1, 4)
    cache = StateCache(model)
    model(x, **{CACHE: cache})
    window = torch.zeros(1, 1, 1, 5)
    window[..., :3] = torch.finfo(torch.float32).min
    with pytest.raises(ValueError, match="attention_mask must be of padding"):
        model(x[:, :1], attention_mask=window, **{CACHE: cache})


@torch.no_grad()
def test_padding_stays_padding() -> None:
    """DynamicCache hides and shows what it keeps as each call's mask says; a state has it in its sums, or has not."""
    model, x = decoder(), words(2, 7)
    there = torch.ones_like(x)
    there[1, :2] = 0
    for first, now in ((None, there), (there, torch.ones_like(x)), (None, torch.ones(2, 1, dtype=torch.long))):
        cache = StateCache(model)
        model(x[:, :6], attention_mask=None if first is None else first[:, :6], **{CACHE: cache})
        with pytest.raises(ValueError, match="attention_mask must say of the tokens before"):
            model(x[:, 6:], attention_mask=now, **{CACHE: cache})
    cache = StateCache(model)
    model(x[:, :5], attention_mask=there[:, :5], **{CACHE: cache})
    model(x[:, 5:6], **{CACHE: cache})
    cache.batch_select_indices(torch.tensor([1, 0]))
    got = model(x[[1, 0], 6:], attention_mask=there[[1, 0]], **{CACHE: cache}).logits
    want = model(x, attention_mask=there).logits[[1, 0], 6:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_autocast() -> None:
    """Rotated keys are wider than values there, which DynamicCache evens out and nothing else does."""
    model, x = decoder(), words(2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x, **{CACHE: transformers.DynamicCache(config=model.config)}).logits
        assert torch.equal(model(x, use_cache=False).logits, wanted)
        assert torch.equal(model(x, **{CACHE: StateCache(model)}).logits, wanted)


@torch.no_grad()
def test_parameters_that_a_hook_brings() -> None:
    """Offloaded weights are there within a module's call alone."""
    model, x = decoder(), words(1, 6)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32), "use_cache": False}

    def answers() -> list[Tensor]:
        pieces = cached(model, [x[:, :5], x[:, 5:]], StateCache(model))
        return [pieces, *model(x, output_attentions=True).attentions, model(x, **bounds).logits]

    wanted = answers()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.set_transport.references.is_meta
    for got, want in zip(answers(), wanted, strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_masks_of_heads_that_share_keys() -> None:
    """Doge's masks are each query head's own."""
    model, x = decoder("doge"), words(2, 7)
    cache = transformers.DynamicCache(config=model.config)
    got = cached(model, [*x.split([1, 4, 1, 1], 1)], cache)
    torch.testing.assert_close(got, model(x).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_that_hides_the_state_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, update = decoder(), StateLayer.update
    monkeypatch.setattr(StateLayer, "update", lambda *a, **k: tuple(t.clone() for t in update(*a, **k)))
    cache = StateCache(model)
    model(words(1, 3), **{CACHE: cache})
    with pytest.raises(ValueError, match="hides the state"):
        model(words(1, 1), **{CACHE: cache})
