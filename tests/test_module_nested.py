"""NestedTensors of both layouts: what each sequence alone gives, empty ones among them."""

from __future__ import annotations

import pytest
import torch
from nn_helpers import E, H, M
from torch import Tensor, nn

from setformer_kernels.models import initialize_references, replace_attention
from setformer_kernels.nn import AttentionInputError, SeTAttention, SeTPooling

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors",
    "ignore:Failed to initialize NumPy",
    "ignore:enable_nested_tensor is True",
)

LAYOUTS = [torch.strided, torch.jagged]
LENGTHS = [(0,), (0, 0), (0, 3), (3, 0, 2), (1,), (2, 2)]


def nest(lengths: tuple[int, ...], layout: torch.layout = torch.strided, width: int = E, **arguments) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(n, width) for n in lengths], layout=layout, **arguments)


def attention(**own) -> SeTAttention:
    torch.manual_seed(0)
    return SeTAttention(E, H, batch_first=True, num_references=M, **own)


def assert_each_alone(got: Tensor, want: list[Tensor]) -> None:
    assert len(got.unbind()) == len(want)
    for ours, alone in zip(got.unbind(), want, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("own", [{}, {"value_map": "rkhs", "learn_epsilon": True}], ids=str)
def test_module_with_gradients(lengths, layout, own):
    module = attention(**own)
    x = nest(lengths, layout, requires_grad=True)
    output, weights = module(x, x, x)
    assert output.layout == layout
    assert weights.shape == (len(lengths), max(lengths), max(lengths))
    torch.cat(output.unbind()).square().sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    alone = [y.detach().requires_grad_() for y in x.unbind()]
    want = [module(y, y, y)[0] for y in alone]
    assert_each_alone(output, want)
    torch.cat(want).square().sum().backward()
    assert_each_alone(x.grad, [y.grad for y in alone])
    for ours, theirs in zip(grads, (p.grad for p in module.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_in_an_encoder_layer(lengths, layout):
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    layer.self_attn = attention()
    x = nest(lengths, layout)
    with torch.no_grad():
        assert_each_alone(layer.eval()(x), [layer.train()(y) for y in x.unbind()])


def test_jagged_with_gaps_between_its_sequences():
    module, starts, lengths = attention(), torch.tensor([0, 1, 2]), torch.tensor([3, 5, 0])
    x = torch.nested.narrow(torch.randn(3, 6, E), 1, starts, lengths, layout=torch.jagged)
    output, _ = module(x, x, x)
    assert_each_alone(output + x, [module(y, y, y)[0] + y for y in x.unbind()])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_positions(layout, nested):
    """Nested as the tokens are, or padded with anything."""
    module = attention(position_dim=2)
    x, memory = nest((3, 0, 2), layout), nest((1, 4, 2), layout)
    at, of = nest((3, 0, 2), layout, 2), nest((1, 4, 2), layout, 2)
    given = [at, of] if nested else [torch.nested.to_padded_tensor(p, float("inf")) for p in (at, of)]
    output, _ = module(x, memory, memory, query_position=given[0], key_position=given[1], need_weights=False)
    parts = zip(*(y.unbind() for y in (x, memory, at, of)), strict=True)
    assert_each_alone(output, [module(q, k, k, query_position=p, key_position=s)[0] for q, k, p, s in parts])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pooling(lengths, layout):
    module = SeTPooling(E, H, num_references=M, position_dim=2)
    x, position = nest(lengths, layout), nest(lengths, layout, 2)
    output = module(x, key_position=position)
    assert output.shape == (len(lengths), M, E)
    parts = zip(x.unbind(), position.unbind(), strict=True)
    assert_each_alone(output, [module(y[None], key_position=p)[0] for y, p in parts])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("build", [SeTAttention, SeTPooling])
def test_references_are_placed_as_on_padded_tokens(build, layout):
    module = build(
        E,
        H,
        num_references=M,
        value_map="rkhs",
        position_dim=2,
        **({"batch_first": True} if build is SeTAttention else {}),
    )
    x, position = nest((9, 0, 12), layout), nest((9, 0, 12), layout, 2)
    padding = torch.arange(12) >= torch.tensor([9, 0, 12])[:, None]
    placed = []
    for tokens, at, mask in (
        (x, position, None),
        (*(torch.nested.to_padded_tensor(y, 7.0) for y in (x, position)), padding),
    ):
        generator = torch.Generator().manual_seed(0)
        module.initialize_references(tokens, mask, key_position=at, generator=generator)
        placed.append([p.clone() for p in (module.references, module.landmarks, module.reference_position)])
    for ours, theirs in zip(*placed, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_references_of_an_encoder_are_placed_on_padded_samples():
    """In eval the encoder packs them into a NestedTensor."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, batch_first=True), 2)
    replace_attention(encoder, num_references=M)
    before = [layer.self_attn.references.clone() for layer in encoder.layers]
    padding = torch.arange(10) >= torch.arange(10, 2, -1)[:, None]
    initialize_references(encoder, torch.randn(8, 10, E), src_key_padding_mask=padding)
    assert not any(torch.equal(a, layer.self_attn.references) for a, layer in zip(before, encoder.layers, strict=True))


def sequences(*shapes: tuple[int, ...]) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(shape) for shape in shapes])


UNFIT = {
    "no sequences": (lambda: torch.nested.nested_tensor([]), "query must hold at least one sequence"),
    "none, jagged": (
        lambda: torch.nested.nested_tensor_from_jagged(torch.zeros(0, E), offsets=torch.tensor([0])),
        "query must hold at least one sequence",
    ),
    "no widths": (lambda: sequences((3,), (2,)), "got a 2-D NestedTensor of 2"),
    "images": (lambda: sequences((3, 2, E), (2, 2, E)), "got a 4-D NestedTensor of 2"),
    "widths": (lambda: sequences((3, E), (3, E + 1)), r"of one width, got .* with widths \[16, 17\]"),
    "transposed": (lambda: sequences((3, E), (2, E)).transpose(1, 2), r"with widths \[2, 3\]"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_padded_is_refused_with_torchs_class(case):
    build, words = UNFIT[case]
    x = build()
    with pytest.raises(AssertionError):
        nn.MultiheadAttention(E, H, batch_first=True)(x, x, x)
    with pytest.raises(AttentionInputError, match=words):
        attention()(x, x, x)
    with pytest.raises(AttentionInputError, match=words.replace("query", "x")):
        SeTPooling(E, H)(x)
    with pytest.raises(AttentionInputError, match=words.replace("query", "tokens")):
        attention().initialize_references(x)


def test_nested_and_dense_do_not_mix():
    module, x, dense = attention(position_dim=2), nest((3, 2)), torch.randn(2, 3, E)
    pool = SeTPooling(E, H)
    with pytest.raises(AttentionInputError, match="carries its own padding: key_padding_mask must be None"):
        pool(x, torch.zeros(2, 3))
    with pytest.raises(AttentionInputError, match="tokens, value must all be nested"):
        module.initialize_references(x, value=dense)
    with pytest.raises(TypeError, match="`key_padding_mask` must be a dense tensor"):
        module(dense, dense, dense, key_padding_mask=x)
    with pytest.raises(TypeError, match="`query_position` must be a dense tensor"):
        module(dense, dense, dense, query_position=x, key_position=x)
    with pytest.raises(TypeError, match="`key_position` must be a dense tensor"):
        pool(dense, key_position=x)
