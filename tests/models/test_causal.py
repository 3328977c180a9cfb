"""The causal language model: what it forgets, padding in any place, pieces of any length, training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setformer_kernels.models import CausalDecoder, CausalLM, Past
from setformer_kernels.models import initialize_references as place
from setformer_kernels.models.causal import CausalAttention, CausalTransport, ShortConvolution

B, L, VOCAB = 3, 11, 30


def decoder(**arguments: object) -> CausalDecoder:
    sizes = {"vocab_size": VOCAB, "width": 16, "depth": 2, "num_heads": 2, "hidden": 32, "num_references": 5}
    return CausalDecoder(**{**sizes, **arguments}).double().eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape or (B, L))


def in_pieces(model: CausalDecoder, x: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    """Hidden states of x, some tokens a call."""
    past, parts = None, []
    for i, piece in enumerate(x.split(sizes, 1)):
        there = None if mask is None else mask.split(sizes, 1)[i]
        hidden, past = model.with_past(piece, there, past=past)
        parts.append(hidden)
    return torch.cat(parts, 1)


VARIANTS = [{}, {"conv_width": 1}, {"gate": False}, {"conv_width": 1, "gate": False}, {"attention": {"num_iters": 0}},
            {"attention": {"value_map": "rkhs", "learn_epsilon": True}}]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_text_in_pieces_of_any_length(variant: dict[str, object]) -> None:
    model, x = decoder(**variant), ids()
    want = model(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for sizes in ([4, 7], [1, 2, 8], [10, 1], [1] * L):
                torch.testing.assert_close(in_pieces(model, x, sizes), want)


def test_later_tokens_change_nothing() -> None:
    model, x = decoder(), ids()
    other = torch.cat([x[:, :6], ids(B, L - 6)], 1)
    torch.testing.assert_close(model(other)[:, :6], model(x)[:, :6])
    assert not torch.allclose(model(other)[:, 6:], model(x)[:, 6:])


# One row without padding, one with it everywhere, one whose only token is the last.
MASK = torch.tensor([[1] * 11, [0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0], [0] * 10 + [1]])


@pytest.mark.parametrize("sizes", [[11], [4, 1, 6], [1] * 11], ids=str)
def test_padding_in_any_place_and_any_piece_is_as_if_it_were_not_there(sizes: list[int]) -> None:
    model, x = decoder(), ids()
    with torch.no_grad():
        got = in_pieces(model, x, sizes, MASK)
        for row, there in enumerate(MASK.bool()):
            torch.testing.assert_close(got[row, there], model(x[row : row + 1, there])[0])
    assert got.isfinite().all()


def test_a_token_that_is_not_there_leaves_the_past_as_it_was() -> None:
    model = decoder()
    with torch.no_grad():
        _, past = model.with_past(ids())
        before = [Past(*(t.clone() for t in one)) for one in past]
        _, after = model.with_past(ids(B, 1), torch.zeros(B, 1), past=past)
        _, later = model.with_past(ids(B, 3), torch.zeros(B, 3), past=after)
    for one, two, three in zip(before, after, later, strict=True):
        for a, b, c in zip(one, two, three, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_the_past_is_of_constant_size() -> None:
    model = decoder()
    sizes = []
    with torch.no_grad():
        for length in (1, 40):
            _, past = model.with_past(ids(B, length))
            sizes.append([tuple(t.shape) for one in past for t in one])
    assert sizes[0] == sizes[1] == [(B, 48, 3), (B, 2, 5, 2 * 8 + 3)] * 2


def test_a_closed_gate_forgets_and_an_open_one_keeps() -> None:
    attention = CausalAttention(16, 2, conv_width=1, num_references=5).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    nn.init.constant_(attention.gate.bias, -1000.0)
    alone = attention(x[:, -1:])[0]
    torch.testing.assert_close(attention(x)[0][:, -1:], alone)
    nn.init.constant_(attention.gate.bias, 1000.0)
    kept = attention(x)[0]
    attention.gate = None
    torch.testing.assert_close(kept, attention(x)[0])
    assert not torch.allclose(kept[:, -1:], alone)


def test_gates_start_with_memories_from_short_to_long() -> None:
    gate = CausalAttention(32, 4).gate
    keep = gate(torch.randn(1, 3, 32)).exp()
    assert keep.shape == (1, 4, 3)
    torch.testing.assert_close(1 / (1 - keep[0, :, 0]), torch.tensor([8.0, 32.0, 128.0, 512.0]), rtol=1e-3, atol=0.0)


def test_the_convolution_reaches_over_its_width() -> None:
    conv, x = ShortConvolution(6, 4), torch.randn(1, 9, 6)
    y, inputs = conv(x)
    assert inputs.shape == (1, 6, 12)
    torch.testing.assert_close(y[0, 7], (x[0, 4:8].T * conv.weight[:, 0]).sum(1))
    torch.testing.assert_close(y[0, 0], x[0, 0] * conv.weight[:, 0, 3])


def test_gradients_reach_every_parameter_and_recomputing_changes_none() -> None:
    model, x = CausalLM(decoder()).double(), ids()
    grads = []
    for recompute in (False, True):
        model.decoder.set_grad_checkpointing(recompute)
        model.zero_grad()
        nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(g.isfinite().all() and g.any() for g in grads[0])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_gradients_through_a_past() -> None:
    """A state carries its gradient: pieces train as the whole does."""
    model, x = decoder(), ids()
    model(x)[:, 6:].sum().backward()
    want = model.blocks[0].attention.in_proj.weight.grad.clone()
    model.zero_grad()
    _, past = model.with_past(x[:, :6])
    model(x[:, 6:], past=past).sum().backward()
    torch.testing.assert_close(model.blocks[0].attention.in_proj.weight.grad, want)


def test_it_learns_what_needs_the_order() -> None:
    """The next token is the one before the last."""
    model = CausalLM(decoder(vocab_size=6, depth=1)).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    for _ in range(40):
        x = torch.randint(6, (32, 2)).repeat(1, 3)
        loss = nn.functional.cross_entropy(model(x)[:, 1:-1].flatten(0, 1), x[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_references_are_placed_on_the_keys() -> None:
    model = decoder()
    before = model.blocks[1].attention.transport.references.clone()
    place(model, ids())
    assert not torch.allclose(model.blocks[1].attention.transport.references, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": {"num_iters": 2}}, "num_iters must be 0 or 1 in a causal model, got 2"),
        ({"attention": {"position_dim": 1}}, "position_dim must be 0"),
        ({"conv_width": 0}, "conv_width must be .*got 0"),
        ({"num_heads": 3}, "embed_dim must be divisible by num_heads"),
    ],
)
def test_what_a_wrong_model_gets(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(**arguments)


def test_what_a_wrong_call_gets() -> None:
    model, x = decoder(), ids()
    with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask must be \[3, 11\], as the text, got \[3, 4\]"):
        model(x, torch.ones(3, 4))
    with pytest.raises(ValueError, match="past must have one Past a block, 2, got 1"):
        model(x, past=[Past()])
    with pytest.raises(ValueError, match=r"inputs_embeds must be \[B, L, 16\]"):
        model(inputs_embeds=torch.zeros(1, 2, 3))


def test_what_a_transport_does_instead_of_a_call() -> None:
    """Weights, packs and streams, which go through a call of the module, as those of transports that are not causal."""
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    transport = CausalTransport(2, 4, q, {"num_references": 5})
    o = transport(q, k, v)[0]
    torch.testing.assert_close(transport.weights(q, k, is_causal=True) @ v, o)
    bounds = torch.tensor([0, 7], dtype=torch.int32)
    torch.testing.assert_close(transport.packed(q[0], k[0], v[0], bounds, None, is_causal=True), o[0])
    torch.testing.assert_close(transport.streamed(q, k, v, None)[0], o)
