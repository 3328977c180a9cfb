"""How the tokens of a head are shared among programs, and the small device functions that have a rule of their own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from setformer_kernels.backends.triton.device.primitives import leading, rounded
from setformer_kernels.backends.triton.host import tiles
from setformer_kernels.backends.triton.host.launch import BEGINNING, split_tokens
from setformer_kernels.backends.triton.host.tiles import INTERPRETED, Tile
from setformer_kernels.functional import set_attention

TILE = Tile(64, 64, 4, 1, resident=2)
SIZES = ("small", "wide", "medium", "many", "large")


@pytest.mark.parametrize(
    ("length", "heads", "programs"),
    [
        (16384, 16, 16),  # 256 of the 264 that fit at a time: 17 for each head would take two turns
        (4096, 16, 16),
        (1024, 128, 2),
        (1024, 100, 2),
        (4096, 100, 5),  # in two turns, of which the second is nearly full too
        (196, 4096, 1),
        (0, 16, 1),
    ],
)
def test_programs_fill_the_device_in_whole_turns(length: int, heads: int, programs: int) -> None:
    assert split_tokens(length, TILE, heads, 132).programs == programs


def test_a_split_covers_all_tokens_and_none_takes_less() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tiles, heads, slots = (int(torch.randint(1, n, (), generator=generator)) for n in (300, 600, 140))
        length = (tiles - 1) * TILE.rows + int(torch.randint(1, TILE.rows + 1, (), generator=generator))
        split = split_tokens(length, TILE, heads, slots)
        assert split.stretch % TILE.rows == 0
        assert (split.programs - 1) * split.stretch < length <= split.programs * split.stretch

        def time(count: int, tiles: int = tiles, heads: int = heads, slots: int = slots) -> int:
            return math.ceil(heads * count / (2 * slots)) * (math.ceil(tiles / count) + BEGINNING)

        assert time(split.programs) <= min(time(count) for count in (1, 2, 3, max(1, 2 * slots // heads)))


@triton.jit
def _parts(x, high, low, dtype: tl.constexpr):
    i = tl.arange(0, 256)
    first = leading(tl.load(x + i), dtype)
    tl.store(high + i, first)
    tl.store(low + i, rounded(tl.load(x + i) - first, dtype))


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and Triton is not interpreted")
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 15), (torch.float16, 21), (torch.float32, 24)])
def test_two_parts_of_a_weight_hold_twice_the_digits_of_its_dtype(dtype: torch.dtype, bits: int) -> None:
    device = "cpu" if INTERPRETED else "cuda"
    x = torch.rand(256, device=device) + 0.5
    high, low = torch.empty_like(x), torch.empty_like(x)
    _parts[(1,)](x, high, low, getattr(tl, str(dtype).removeprefix("torch.")))
    assert torch.equal(high, high.to(dtype).float())
    assert ((high.double() + low - x.double()).abs() <= 2.0**-bits * x).all()


@pytest.mark.skipif(not INTERPRETED, reason="on the interpreter, whose tile is another")
@pytest.mark.parametrize(("num_iters", "width"), [(0, 16), (1, 16), (3, 16), (1, 80), (3, 80)])
def test_a_frugal_pass_over_the_keys_leaves_the_same_bits(
    num_iters: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dv before the products with v, the keys read anew, dg^1 through memory: in another order, the same numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 100, width), (1, 2, 100, 16), (2, 8, width))
    key, value, references = (torch.randn(shape, generator=generator) for shape in shapes)

    def gradients() -> list[torch.Tensor]:
        given = [t.clone().requires_grad_() for t in (key, key, value, references)]
        out = set_attention(*given, num_iters=num_iters, backend="triton")
        return list(torch.autograd.grad(out.square().sum(), given))

    expected = gradients()
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.INTERPRETER._replace(frugal=True))
    assert all(torch.equal(found, e) for found, e in zip(gradients(), expected, strict=True))


def test_a_size_without_a_row_is_cut_as_its_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [tiles.size_of(64), tiles.size_of(65), tiles.size_of(128, 128), tiles.size_of(129, 16)] == [
        "small", "medium", "medium", "large",
    ]  # fmt: skip
    assert [tiles.size_of(128, m) for m in (16, 64, 65)] == ["wide", "wide", "medium"]
    medium, own = tiles.shipped("sm_90", ("columns_backward", "medium", "half")), Tile(16, 64, 4, 1)
    assert tiles.tile("columns_backward", "sm_90", 128, 2, 64) == medium
    monkeypatch.setitem(tiles.OVERRIDES["sm_90"], ("gradient", "wide", "half"), own)  # what the kind is like
    assert tiles.tile("columns_backward", "sm_90", 128, 2, 64) == own
    assert tiles.tile("columns_backward", "sm_90", 128, 2) == medium
    assert [tiles.size_of(256, m) for m in (64, 128, 256)] == ["large", "large", "many"]
    assert tiles.tile("row", "sm_90", 256, 2, 256) == tiles.tile("row", "sm_90", 256, 2)
    assert tiles.tile("chunk", "sm_90", 256, 2, 256) != tiles.tile("chunk", "sm_90", 256, 2, 64)


@pytest.mark.parametrize("family", tiles.OVERRIDES)
def test_blocks_of_queries_in_range_hold_whole_tiles_of_the_backward_passes(family: str) -> None:
    """`Work.out_of_range` is told for each block of the forward's rows."""
    for size, width in itertools.product(SIZES, ("half", "single")):
        block = tiles.shipped(family, ("masked", size, width)).rows
        for kind in ("masked_backward", "masked_keys_backward", "masked_far_backward", "masked_far_keys_backward"):
            assert block % tiles.shipped(family, (kind, size, width)).rows == 0, (kind, size, width)


def test_no_tile_for_amd_has_a_bound_of_registers() -> None:
    """Triton's compiler for these GPUs knows none."""
    assert any(tile.registers for tile in tiles.DEFAULT.values())
    assert not any(tile.registers for tile in tiles.AMD.values())


@pytest.mark.parametrize("family", tiles.OVERRIDES)
def test_passes_with_tiles_of_their_own_walk_the_chunks_of_the_others(family: str) -> None:
    """What one leaves for each chunk, the next reads."""
    for key in itertools.product(SIZES, ("half", "single")):
        others = tiles.shipped(family, ("chunk_backward", *key))
        for kind in ("chunk_queries", "chunk_gates"):
            assert tiles.shipped(family, (kind, *key)).rows == others.rows
