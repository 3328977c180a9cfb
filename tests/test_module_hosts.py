"""SeTAttention inside the blocks that hold an nn.MultiheadAttention, in train, eval and inference mode with padding."""

from __future__ import annotations

import pytest
import torch
from nn_helpers import B, E, H, S, like, swap
from torch import Tensor, nn

from setformer_kernels.nn import SeTAttention

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

MODES = ["train", "eval", "no_grad", "inference"]
PAD = torch.arange(S) >= torch.tensor([S, S - 2, S - 4])[:, None]  # [B, S], left aligned as a NestedTensor wants


def run(model: nn.Module, mode: str, *x, **call) -> Tensor:
    """The output in one of MODES, detached."""
    model.train(mode == "train")
    guard = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with guard():
        out = model(*x, **call)
    return out.detach().clone()


def encoder(order: str, **arguments) -> nn.Module:
    """Two layers, swapped before or after the encoder is built."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, **arguments)
    nested = not arguments.get("norm_first", False)
    if order == "before":
        layer.self_attn = like(layer.self_attn)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    return swap(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("arguments", [{}, {"norm_first": True}, {"activation": "gelu", "bias": True}], ids=str)
def test_encoder_gives_the_same_in_every_mode(order, arguments):
    """In eval, torch would run softmax attention in C++ from our weights; with padding, on a NestedTensor."""
    model = encoder(order, **arguments)
    assert all(type(layer.self_attn) is SeTAttention for layer in model.layers)
    x = torch.randn(B, S, E)
    for call in ({}, {"src_key_padding_mask": PAD}, {"mask": torch.randn(S, S)}):
        real = ~PAD if "src_key_padding_mask" in call else torch.ones(B, S, dtype=torch.bool)
        want = run(model, "train", x, **call)[real]
        for mode in MODES[1:]:
            torch.testing.assert_close(run(model, mode, x, **call)[real], want, rtol=1e-5, atol=1e-5)


def test_encoder_layer_alone_in_eval():
    torch.manual_seed(0)
    layer = swap(nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True))
    x = torch.randn(B, S, E)
    torch.testing.assert_close(run(layer, "inference", x), run(layer, "train", x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_encoder_padding_never_matters(mode):
    model = encoder("after")
    x = torch.randn(B, S, E)
    want = run(model, mode, x, src_key_padding_mask=PAD)
    garbage = torch.where(PAD[..., None], 100 * torch.randn(B, S, E), x)
    got = run(model, mode, garbage, src_key_padding_mask=PAD)
    torch.testing.assert_close(got[~PAD], want[~PAD], rtol=1e-5, atol=1e-5)
    alone = run(model, mode, x[1:2, : S - 2])
    torch.testing.assert_close(alone[0], want[1, : S - 2], rtol=1e-5, atol=1e-5)


def test_encoder_takes_the_nested_path():
    """Otherwise the padding test above would not be testing it: torch zeroes the padding when it unpads."""
    out = run(encoder("after"), "inference", torch.randn(B, S, E), src_key_padding_mask=PAD)
    assert (out[PAD] == 0).all()
    assert (out[~PAD] != 0).any()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_input_gives_nested_output(layout):
    module = SeTAttention(E, H, batch_first=True, num_references=5)
    sequences = [torch.randn(n, E) for n in (3, 6, 1)]
    nested = torch.nested.as_nested_tensor(sequences, layout=layout)
    output, weights = module(nested, nested, nested, need_weights=False)
    assert output.is_nested
    assert output.layout == layout
    assert weights is None
    for got, x in zip(output.unbind(), sequences, strict=True):
        torch.testing.assert_close(got, module(x, x, x)[0])
    memory = torch.nested.as_nested_tensor([torch.randn(n, E) for n in (2, 5, 4)], layout=layout)
    cross, A = module(nested, memory, memory)
    assert A.shape == (3, 6, 5)
    for got, x, y in zip(cross.unbind(), sequences, memory.unbind(), strict=True):
        torch.testing.assert_close(got, module(x, y, y)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_causal_masks(mode, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=batch_first)
    model = swap(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first))
    x = torch.randn((B, S, E) if batch_first else (S, B, E))
    mask = nn.Transformer.generate_square_subsequent_mask(S)
    length_dim = 1 if batch_first else 0
    want = run(model, mode, x, mask=mask, is_causal=True)
    torch.testing.assert_close(run(model, mode, x, mask=mask), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(model, mode, x, mask=mask, is_causal=False), want, rtol=1e-5, atol=1e-5)
    x.narrow(length_dim, S - 2, 2).normal_()
    got = run(model, mode, x, mask=mask).narrow(length_dim, 0, S - 2)
    torch.testing.assert_close(got, want.narrow(length_dim, 0, S - 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_decoder(mode):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    model = swap(nn.TransformerDecoder(layer, 2))
    assert sum(type(m) is SeTAttention for m in model.modules()) == 4
    target, memory = torch.randn(B, 5, E), torch.randn(B, S, E)
    call = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "memory_key_padding_mask": PAD,
        "tgt_key_padding_mask": torch.zeros(B, 5).masked_fill(torch.arange(5) > 3, -torch.inf),
    }
    want = run(model, mode, target, memory, **call)
    assert torch.isfinite(want).all()
    later, other = target.clone(), torch.where(PAD[..., None], -50.0, memory)
    later[:, 3:] = torch.randn(B, 2, E)
    got = run(model, mode, later, other, **call)
    torch.testing.assert_close(got[:, :3], want[:, :3], rtol=1e-5, atol=1e-5)
    masked_memory = run(model, mode, target, memory, memory_mask=torch.zeros(5, S), memory_is_causal=False, **call)
    torch.testing.assert_close(masked_memory, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_whole_transformer(mode):
    torch.manual_seed(0)
    model = swap(nn.Transformer(E, H, 1, 1, 32, dropout=0.0, batch_first=True))
    source, target = torch.randn(B, S, E), torch.randn(B, 5, E)
    call = {"src_key_padding_mask": PAD, "memory_key_padding_mask": PAD, "tgt_is_causal": True}
    call["tgt_mask"] = model.generate_square_subsequent_mask(5).to(torch.bool)
    want = run(model, mode, source, target, **call)
    got = run(model, mode, torch.where(PAD[..., None], 9.0, source), target, **call)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Detr(nn.Module):
    """Positions are added to queries and keys but not to values; learned queries are expanded over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(E, H, dropout=0.0)
        self.cross_attn = nn.MultiheadAttention(E, H, dropout=0.0)
        self.queries = nn.Parameter(torch.randn(4, E))
        self.position = nn.Parameter(torch.randn(S, 1, E))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q = k = x + self.position
        memory = x + self.self_attn(q, k, value=x, attn_mask=None, key_padding_mask=padding)[0]
        query = self.queries.unsqueeze(1).expand(-1, x.shape[1], -1)
        return self.cross_attn(query=query, key=memory + self.position, value=memory, key_padding_mask=padding)[0]


class Clip(nn.Module):
    """open_clip's ResidualAttentionBlock, its causal text mask held as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(E)
        self.attn = nn.MultiheadAttention(E, H, batch_first=True)
        self.register_buffer("mask", torch.full((S, S), float("-inf")).triu_(1), persistent=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.ln_1(x.transpose(0, 1))
        mask = self.mask.to(x.dtype)
        # as open_clip does for padded text: one additive mask for every batch element and head
        mask = mask + torch.zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None]
        return self.attn(x, x, x, need_weights=False, attn_mask=mask.repeat_interleave(H, 0))[0]


class Mask2Former(nn.Module):
    """Cross-attention whose bool mask forbids, per head, what the last mask prediction left out."""

    def __init__(self) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(E, H)
        self.queries = nn.Parameter(torch.randn(4, 1, E))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        query = self.queries.repeat(1, x.shape[1], 1)
        mask = (torch.einsum("qne,sne->nqs", query, x) < 0) | padding[:, None]
        mask = mask.repeat_interleave(H, 0).detach()
        mask = mask & ~mask.all(-1, keepdim=True) | padding.repeat_interleave(H, 0)[:, None]
        return self.cross_attn(query, x, x, attn_mask=mask)[0]


class Siglip(nn.Module):
    """Hugging Face's attention pooling head: one learned probe reads the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, E))
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(self.probe.repeat(len(x), 1, 1), x, x, key_padding_mask=padding)[0]


class Conformer(nn.Module):
    """torchaudio's conformer layer calls by keyword, sequence first, and without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(E, H, dropout=0.0)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.self_attn(query=x, key=x, value=x, key_padding_mask=padding, need_weights=False)[0]


BLOCKS = [Detr, Clip, Mask2Former, Siglip, Conformer]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_give_the_same_in_every_mode_whatever_the_padding_holds(block):
    torch.manual_seed(0)
    original = block()
    model = swap(original)
    assert any(type(m) is SeTAttention for m in model.modules())
    assert not any(type(m) is nn.MultiheadAttention for m in model.modules())
    x = torch.randn(S, B, E)
    want = run(model, "train", x, padding=PAD)
    assert want.shape == run(original, "train", x, padding=PAD).shape
    garbage = torch.where(PAD.T[..., None], 30 * torch.randn(S, B, E), x)
    real = ~PAD if want.shape[:2] == (B, S) else ~PAD.T if want.shape[:2] == (S, B) else ...
    for mode in MODES:
        torch.testing.assert_close(run(model, mode, x, padding=PAD), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(model, mode, garbage, padding=PAD)[real], want[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_learn(block):
    """Twenty steps of Adam on a fixed target lower the loss, through every parameter."""
    torch.manual_seed(0)
    model = swap(block())
    x = torch.randn(S, B, E)
    target = 0.1 * torch.randn_like(run(model, "train", x, padding=PAD))
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (model(x, padding=PAD) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
