"""replace_attention on models of every kind: found by transformers' attention interface, not by a list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from benchmarks.conversion import __main__ as command
from benchmarks.conversion.census import built, examined, model_classes
from setformer_kernels import functional as SF
from setformer_kernels.models import initialize_references, replace_attention
from setformer_kernels.models.transformers import masks
from setformer_kernels.models.transformers.attention import set_attention_forward
from setformer_kernels.models.transformers.causal import CACHE
from setformer_kernels.models.transformers.masks import CausalMask

OWN: dict[str, Any] = {"num_references": 4}
KINDS = {
    "encoder, windows": ("modernbert", "ModernBertModel"),
    "decoder, grouped queries": ("qwen3", "Qwen3Model"),
    "decoder, windows and soft caps": ("gemma2", "Gemma2Model"),
    "decoder, latent keys, experts": ("deepseek_v3", "DeepseekV3Model"),
    "decoder, keys chosen by an indexer": ("deepseek_v32", "DeepseekV32Model"),
    "decoder, sinks": ("gpt_oss", "GptOssModel"),
    "encoder and decoder": ("bart", "BartModel"),
    "encoder and decoder, biases of positions": ("t5", "T5Model"),
    "vision": ("dinov2", "Dinov2Model"),
    "vision, learned queries": ("siglip", "SiglipVisionModel"),
    "audio": ("wav2vec2", "Wav2Vec2Model"),
    "audio, encoder and decoder": ("whisper", "WhisperModel"),
    "image and text": ("clip", "CLIPModel"),
    "patches of any number": ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_runs_forward_and_backward(kind: str) -> None:
    folder, name = KINDS[kind]
    row = examined(folder, next(c for c in model_classes(folder) if c.__name__ == name), set())
    assert row is not None
    assert (row.status, row.reason, row.left) == ("converted", "", "")
    assert row.attention


def llama(**changes: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval()


def converted(**own: Any) -> transformers.LlamaForCausalLM:
    model = llama()
    report = replace_attention(model, **{**OWN, **own})
    assert report.replaced == {f"model.layers.{i}.self_attn": "LlamaAttention" for i in range(2)}
    assert model.model.layers[0].self_attn.set_transport.references.shape == (2, 4, 8)
    return model


def words(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 50, (batch, length))


@pytest.mark.parametrize("num_iters", [0, 1, 3])
@torch.no_grad()
def test_a_place_is_answered_from_the_keys_up_to_it(num_iters: int) -> None:
    model, x = converted(num_iters=num_iters), words()
    whole = model(x).logits
    for n in (1, 4, 9):
        torch.testing.assert_close(model(x[:, :n]).logits[:, -1], whole[:, n - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_iters", [1, 3])
@torch.no_grad()
def test_a_cache_is_exact_in_steps_and_in_pieces(num_iters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if num_iters == 1:
        monkeypatch.setattr(SF, "_masked", lambda *_: pytest.fail("the path that is not linear was taken"))
    model, x = converted(num_iters=num_iters), words()
    whole = model(x).logits
    for cuts in ([4, 1, 1, 3], [1] * 9):
        cache = transformers.DynamicCache(config=model.config)
        pieces = [model(piece, **{CACHE: cache}).logits for piece in x.split(cuts, 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_of_a_causal_batch_is_neither_seen_nor_written_out(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "sdpa_mask", lambda **_: pytest.fail("a mask of every query was written out"))
    model, x = converted(), words()
    mask = torch.ones(2, 9, dtype=torch.long)
    there = slice(3, 9) if side == "left" else slice(0, 6)
    mask[1] = 0
    mask[1, there] = 1
    place = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(x, attention_mask=mask, position_ids=place).logits
    torch.testing.assert_close(got[1, there], model(x[1:, there]).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[0], model(x[:1]).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generation_with_and_without_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = converted(), words(2, 5)
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    told = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    cached, again = model.generate(x, **told), model.generate(x, use_cache=False, **told)
    assert torch.equal(cached, again)
    alone = model.generate(x[1:, 2:], max_new_tokens=4, do_sample=False)
    assert torch.equal(alone[0, 3:], cached[1, 5:])
    static = model.generate(x, cache_implementation="static", disable_compile=True, **told)
    assert torch.equal(static, cached)


def _bounds(*lengths: int) -> dict[str, Any]:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


@pytest.mark.parametrize(("num_iters", "told"), [(1, True), (3, True), (1, False)])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(num_iters: int, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = SF.set_attention_varlen
    monkeypatch.setattr(SF, "set_attention_varlen", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    model, x = converted(num_iters=num_iters), words(1, 9)
    place = torch.cat([torch.arange(4), torch.arange(5)])[None]
    got = model(x, position_ids=place, use_cache=False, **(_bounds(4, 5) if told else {})).logits
    apart = torch.cat([model(x[:, :4]).logits, model(x[:, 4:]).logits], 1)
    torch.testing.assert_close(got, apart, rtol=1e-4, atol=1e-5)
    assert len(calls) == (2 if told and num_iters == 1 else 0)  # one a layer: packed kernels, where they can


@torch.no_grad()
def test_a_compiled_decoder_is_one_graph() -> None:
    model, x = llama(num_hidden_layers=1), words()
    replace_attention(model, **OWN)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    given = {"attention_mask": mask, "use_cache": False}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **given).logits, model(x, **given).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_decoder_learns_alike(reentrant: bool) -> None:
    model, x = converted(), words()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    gradients = []
    for again in (False, True):
        if again:
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(x, attention_mask=mask, labels=x, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.set_transport.references.grad)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_references_are_placed_in_a_decoder() -> None:
    model = converted()
    before = model.model.layers[1].self_attn.set_transport.references.detach().clone()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    initialize_references(model, words(), attention_mask=mask)
    assert not torch.equal(model.model.layers[1].self_attn.set_transport.references, before)


@torch.no_grad()
def test_a_bias_of_positions_is_added_to_what_keys_weigh() -> None:
    transformers.set_seed(0)
    model = transformers.T5Model(transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, num_heads=4, num_layers=1, d_ff=48, decoder_start_token_id=0,
    )).eval()  # fmt: skip
    replace_attention(model, **OWN)
    module = model.decoder.block[0].layer[0].SelfAttention
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    bias, keep = torch.randn(1, 4, 5, 5), torch.ones(5, 5, dtype=torch.bool).tril()
    got, _ = set_attention_forward(module, q, k, v, None, position_bias=bias, is_causal=True)
    mask = bias.masked_fill(~keep, -torch.inf).expand(2, 4, 5, 5)
    want = SF.set_attention(q, k, v, module.set_transport.references, attn_mask=mask)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_attention_weights_of_a_decoder_are_causal() -> None:
    model = converted()
    weights = model(words(), output_attentions=True).attentions
    for w in weights:
        assert w.shape == (2, 4, 9, 9)
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 4, 9))
        assert not w.triu(1).any()


def test_a_mask_that_is_told_is_what_it_stands_for() -> None:
    keys = torch.tensor([[True, True, True, False], [False, True, True, True]])
    whole = torch.ones(4, 4, dtype=torch.bool).tril() & keys[:, None, None]
    mask = CausalMask.of((2, 1, 4, 4), "cpu", keys, lambda: whole.clone())
    assert (mask.shape, mask.dtype, mask.dim(), mask.device.type) == ((2, 1, 4, 4), torch.bool, 4, "cpu")
    for operation in (
        lambda m: m[:, :, 1:, :3],
        lambda m: ~m,
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: m & whole,
    ):
        got = operation(mask)
        assert type(got) is Tensor
        assert torch.equal(got, operation(whole))
    assert masks.as_options(mask, 4, 4, False) == {"is_causal": True, "key_mask": keys}
    moved = mask.to("meta", non_blocking=True)
    assert isinstance(moved, CausalMask)
    assert moved.device.type == moved.keys.device.type == "meta"
    assert type(mask.to(torch.float32)) is Tensor
    mask[:, :, 0] = True
    changed = masks.as_options(mask, 4, 4, False)["attn_mask"]
    assert changed[:, :, 0].all()
    assert torch.equal(changed[:, :, 1:], whole[:, :, 1:])


def test_a_mask_of_one_query_is_one_of_keys() -> None:
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
    mask = masks.set_attention_mask(2, 1, 3, 2, 0, attention_mask=padding.bool())
    assert isinstance(mask, CausalMask)
    assert torch.equal(mask.dense(), padding.bool()[:, None, None])
    options = masks.as_options(mask, 1, 3, True)
    assert options["is_causal"] is False
    assert torch.equal(options["key_mask"], padding.bool())


def test_padding_of_an_encoder_is_one_of_keys() -> None:
    """However short the text is that reads it: a mask of rows would take a path that is not linear."""
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    mask = masks.set_attention_mask(2, 2, 5, 0, 0, masks.bidirectional_mask_function, padding)
    options = masks.as_options(mask, 2, 5, False)
    assert [*options] == ["key_mask"]
    assert torch.equal(options["key_mask"], padding)


def test_what_is_left_is_named_with_its_reason() -> None:
    report = replace_attention(built(transformers.BloomModel))
    assert not report.replaced
    reason = "no rule for BloomAttention: it does not go through transformers' attention interface"
    assert set(report.left.values()) == {reason}
    folder = "minimax_m3_vl"
    blocks = built(next(c for c in model_classes(folder) if c.__name__ == "MiniMaxM3VLTextModel"))
    assert "hands its attention block_indices" in next(iter(replace_attention(blocks).left.values()))


def test_keys_of_content_and_position_are_twice_as_wide() -> None:
    from transformers.models.conditional_detr import modeling_conditional_detr as detr

    config = transformers.ConditionalDetrConfig(d_model=32, decoder_attention_heads=4)
    attention = detr.ConditionalDetrDecoderCrossAttention(config, hidden_size=32, num_attention_heads=4)
    model = torch.nn.ModuleDict({"cross": attention})
    assert replace_attention(model, **OWN).replaced == {"cross": "ConditionalDetrDecoderCrossAttention"}
    assert attention.set_transport.references.shape == (4, 4, 16)
    x, places = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    assert attention(x, x, places, places, places)[0].shape == (2, 5, 32)


def test_the_census_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    monkeypatch.setattr("benchmarks.conversion.census.folders", lambda: ["vit", "timm_backbone"])
    monkeypatch.setattr("sys.argv", ["conversion", "--output", str(table), "vit"])
    command.main()
    monkeypatch.setattr("sys.argv", ["conversion", "--output", str(table)])
    command.main()
    said = capsys.readouterr().out
    assert said.count("vit ViTModel: converted") == 1
    assert said.splitlines()[-1].startswith("1 of 1 models whose attention goes through the interface run converted")
    assert [(row["folder"], row["status"]) for row in command.read(table)] == [
        ("timm_backbone", "not built"), ("vit", "converted"),
    ]  # fmt: skip


def test_the_committed_table_of_all_models() -> None:
    rows = command.read(command.RESULTS)
    of = {status: [row for row in rows if row["status"] == status] for status in {row["status"] for row in rows}}
    asked = len(of["converted"]) + len(of["failed"])
    asked += sum(row["reason"] != command.ELSEWHERE for row in of["left"])
    assert len(rows) > 500
    assert len(of["converted"]) / asked >= 0.9
    assert all(row["reason"] for row in rows if row["status"] not in ("converted", "none"))


def test_references_are_placed_on_packs_and_once_where_weights_are_asked_for() -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    placed = []
    for asked in (False, True):
        model = converted()
        torch.manual_seed(1)
        initialize_references(model, words(), attention_mask=mask, output_attentions=asked)
        placed.append(model.model.layers[0].self_attn.set_transport.references.detach())
    assert torch.equal(*placed)
    model = converted()
    before = model.model.layers[1].self_attn.set_transport.references.detach().clone()
    place = torch.cat([torch.arange(4), torch.arange(5)])[None]
    initialize_references(model, words(1, 9), position_ids=place, use_cache=False, **_bounds(4, 5))
    assert not torch.equal(model.model.layers[1].self_attn.set_transport.references, before)
