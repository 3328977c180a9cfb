"""`generate` of the causal language model: every way of it gives what the model without a cache gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache

from setformer_kernels.models.transformers import SeTformerCausalConfig, SeTformerForCausalLM
from setformer_kernels.models.transformers.causal import CACHE

VOCAB, NEW = 40, 4
TINY = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "num_references": 4}  # fmt: skip
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def built(**changes: Any) -> SeTformerForCausalLM:
    """Weights large enough that what comes next depends on all that was."""
    torch.manual_seed(0)
    config = SeTformerCausalConfig(**{**TINY, "initializer_range": 0.5, "pad_token_id": 0, **changes})
    return AutoModelForCausalLM.from_config(config).double().eval()


def prompt(length: int = 9, rows: int = 2) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length))


def continued(model: SeTformerForCausalLM, x: Tensor, **how: Any) -> Tensor:
    return model.generate(x, **{**GREEDY, "attention_mask": torch.ones_like(x), **how})[:, x.shape[1] :]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 4, "num_return_sequences": 2},
    "pieces": {"prefill_chunk_size": 4},
    "single tokens": {"prefill_chunk_size": 1},
    "static": {"cache_implementation": "static"},
    "static in pieces": {"cache_implementation": "static", "prefill_chunk_size": 5},
}
ALONE = ("num_beams", "num_return_sequences")  # what changes the answer


@pytest.mark.parametrize("way", WAYS)
def test_with_a_cache_as_without(way: str) -> None:
    model, x = built(**({"conv_width": 1} if way == "beams" else {})), prompt()
    plain = {name: value for name, value in WAYS[way].items() if name in ALONE}
    want = continued(model, x, use_cache=False, **plain)
    assert torch.equal(continued(model, x, **WAYS[way]), want)


def test_sampled_with_a_cache_as_without() -> None:
    model, x = built(), prompt()
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        answers.append(continued(model, x, do_sample=True, temperature=2.0, use_cache=use_cache))
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], continued(model, x))


@pytest.mark.parametrize("way", WAYS)
def test_a_padded_batch_is_each_prompt_alone(way: str) -> None:
    model, texts = built(), [prompt(n, 1) for n in (9, 4, 1)]
    x = torch.cat([torch.nn.functional.pad(text, (9 - text.shape[1], 0)) for text in texts])
    got = continued(model, x, attention_mask=(x != 0).long(), **WAYS[way])
    plain = {name: value for name, value in WAYS[way].items() if name in ALONE}
    each = WAYS[way].get("num_return_sequences", 1)
    for i, text in enumerate(texts):
        assert torch.equal(got[i * each : (i + 1) * each], continued(model, text, **plain))


def test_padding_on_the_right_and_inside_leaves_what_is_there_alone() -> None:
    model, x = built(), prompt()
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0]])
    logits = model(x, attention_mask=mask).logits
    for row, there in enumerate(mask.bool()):
        torch.testing.assert_close(logits[row, there], model(x[row : row + 1, there]).logits[0])


def test_generation_goes_on_from_a_cache() -> None:
    """With the whole text again, or with its new tokens and a mask of the whole; padded on the left or not."""
    model, x = built(), prompt()
    x[1, :3] = 0
    mask = (x != 0).long()
    first = model.generate(x, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, prompt(4)], 1)
    whole = torch.cat([mask, torch.ones(2, NEW + 4, dtype=torch.long)], 1)
    want = continued(model, text, attention_mask=whole)
    cache = first[CACHE]
    for tokens in (text, text[:, 9 + NEW - 1 :]):  # the last token that was generated is in no cache yet
        for pieces in (None, 3):
            own = {CACHE: copy.deepcopy(cache), "attention_mask": whole, "prefill_chunk_size": pieces}
            assert torch.equal(continued(model, tokens, **own), want)
    with pytest.raises(ValueError, match="input_ids must be the whole text, beginning with the 12 tokens"):
        continued(model, text[:, -5:], **{CACHE: copy.deepcopy(cache), "attention_mask": whole[:, -5:]})


def test_a_prompt_is_read_once_and_answered_often() -> None:
    model, x = built(), prompt(rows=1)
    with torch.no_grad():
        read = getattr(model(x, use_cache=True), CACHE)
    for length in (1, 3):
        text = torch.cat([x, prompt(length, 1)], 1)
        assert torch.equal(continued(model, text, **{CACHE: copy.deepcopy(read)}), continued(model, text))


def test_embeddings_as_a_prompt() -> None:
    model, x = built(), prompt()
    embeds = model.get_input_embeddings()(x).detach()
    got = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(x), **GREEDY)
    assert torch.equal(got, continued(model, x))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_constant_size_that_is_reset_and_used_again(kind: type) -> None:
    model, x = built().float(), prompt()
    length = {"max_cache_len": 100} if kind is StaticCache else {}
    cache = kind(config=model.config, **length)
    taken = []
    with torch.no_grad():
        for piece in (x[:, :2], x[:, 2:], prompt(60)):
            model(piece, **{CACHE: cache})
            states = [s for layer in cache.layers for s in (layer.conv_states, layer.recurrent_states)]
            taken.append([t.nbytes for state in states for t in state.values() if t is not None])
            assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in cache.layers)
        assert taken[0] == taken[1] == taken[2]
        cache.reset()
        parts = [model(piece, **{CACHE: cache}).logits for piece in x.split([3, 1, 5], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(x).logits, rtol=1e-4, atol=1e-5)


def test_the_cache_by_either_name_and_logits_that_are_kept() -> None:
    model, x = built(), prompt()
    want = model(x).logits
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        for grad in (True, False):  # graphs keep what the cache writes over
            cache.reset()
            with torch.set_grad_enabled(grad):
                model(x[:, :5], **{name: cache})
                got = model(x[:, 5:], **{name: cache}, logits_to_keep=2)
                assert getattr(got, CACHE) is cache
                torch.testing.assert_close(got.logits, want[:, -2:])
            if grad:
                got.logits.sum().backward()
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([0, 8])).logits, want[:, [0, 8]])
    with pytest.raises(ValueError, match="as past_key_values or as cache: got both"):
        model(x, cache=cache, past_key_values=cache)
    with pytest.raises(ValueError, match=r"must hold 2 layers of linear attention.*got DynamicCache of \[\]"):
        model(x, **{CACHE: DynamicCache()})
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, 9 or more\]"):
        model(x, attention_mask=torch.ones(2, 4))


def test_compiled_steps_are_one_graph() -> None:
    model, x = built(num_hidden_layers=1).float(), prompt()
    want = continued(model, x)
    how = CompileConfig(fullgraph=True, backend="eager", mode=None)
    how._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for text in (x, torch.cat([torch.zeros_like(x[:, :2]), x], 1)):
        own = {"attention_mask": (text != 0).long(), "cache_implementation": "static", "compile_config": how}
        assert torch.equal(continued(model, text, **own), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_no_tokens_change_nothing() -> None:
    model, x = built(), prompt()
    assert model(x[:, :0]).logits.shape == (2, 0, VOCAB)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in (x[:, :5], x[:, :0], x[:, 5:]):
            got = model(piece, **{CACHE: cache}).logits
        torch.testing.assert_close(got, model(x).logits[:, 5:])
        with pytest.raises(ValueError, match="must be of 1 texts, as the input, got a cache of 2"):
            model(x[:1], **{CACHE: cache})


@torch.no_grad()
def test_what_a_cache_took_in_stays() -> None:
    """A row that ended is filled up with padding, which later masks call so: too late for a state."""
    model, x = built(), prompt()
    cache = DynamicCache(config=model.config)
    model(x[:, :6], **{CACHE: cache})
    there = torch.ones_like(x)
    there[1, 5] = 0
    with pytest.raises(ValueError, match=r"attention_mask must say .* they were \[6, 6\] of the rows, got \[6, 5\]"):
        model(x[:, 6:], attention_mask=there, **{CACHE: cache})


def test_options_of_attention_have_one_place() -> None:
    with pytest.raises(ValueError, match=r"num_iters must be within attention=\{\.\.\.\}, got num_iters=2 beside it"):
        SeTformerCausalConfig(**TINY, num_iters=2)


def test_assisted_generation_is_refused() -> None:
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        continued(built(), prompt(rows=1), assistant_model=built())


def test_losses_and_what_padding_does_to_them() -> None:
    model, x = built().float(), prompt()
    labels = x.clone()
    labels[1, 6:] = -100
    output = model(x, labels=labels)
    want = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, want)
    mask = (labels != -100).long()
    torch.testing.assert_close(model(x, attention_mask=mask, labels=labels).loss, want)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(x, shift_labels=shifted).loss, want)
    torch.testing.assert_close(model(x, shift_labels=shifted, num_items_in_batch=1.0).loss, want * (shifted >= 0).sum())


def test_saved_loaded_and_of_every_auto_class(tmp_path: Path) -> None:
    model, x = built(conv_width=3, attention={"num_iters": 0}), prompt()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, SeTformerCausalConfig)
    assert (config.layer_types, config.conv_width) == (["linear_attention"] * 2, 3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    body = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(body(x).last_hidden_state, model(x, output_hidden_states=True).hidden_states[-1])
    model.resize_token_embeddings(VOCAB + 3)
    assert model(x).logits.shape == (2, 9, VOCAB + 3)


def test_fresh_weights_are_those_of_the_decoder() -> None:
    """transformers draws weights anew after the constructor: what gates and convolutions start from must survive."""
    attention = AutoModelForCausalLM.from_config(SeTformerCausalConfig(**TINY)).setformer.decoder.blocks[0].attention
    torch.testing.assert_close(attention.gate.bias, torch.tensor([7.0, 511.0]).log(), rtol=1e-3, atol=0.0)
    assert attention.conv.weight.std() > 0.2  # uniform in ±1/2, as torch draws it
    torch.testing.assert_close(attention.transport.references.norm(dim=-1), torch.ones(2, 4))


class Counting(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = (torch.arange(12) + index) % 10
        return {"input_ids": x, "labels": x}


def test_trainer_learns_to_count(tmp_path: Path) -> None:
    transformers.set_seed(0)
    model = AutoModelForCausalLM.from_config(SeTformerCausalConfig(**TINY))
    model.activation_checkpointing_enable()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=16, learning_rate=2e-2, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Counting(), eval_dataset=Counting())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5
    answer = model.eval().generate(torch.tensor([[3, 4, 5, 6]]), **GREEDY)[0, 4:]
    assert answer.tolist() == [7, 8, 9, 0]
