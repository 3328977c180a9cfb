"""nvcc compiles every CUDA kernel for every architecture, and none needs more than the committed tables say."""

from __future__ import annotations

import pytest

from benchmarks.compiled import cuda_instructions, cuda_resources
from benchmarks.compiled.gpus import GPUS


@pytest.mark.slow
@pytest.mark.skipif(not cuda_resources.available(), reason="needs nvcc")
def test_no_kernel_needs_more_than_the_table_allows() -> None:
    compiled_for = {int(arch) for arch in cuda_resources.architectures()}
    allowed = {row.key: row for row in cuda_resources.committed() if row.arch in compiled_for}
    assert allowed
    found = {row.key: row for row in cuda_resources.rows()}
    assert found.keys() == allowed.keys()
    for key, row in found.items():
        old = allowed[key]
        assert all(new <= limit for new, limit in zip(row[2:6], old[2:6], strict=True)), (row, old)
        assert row.instructions + row.apart <= 1.02 * (old.instructions + old.apart), (row, old)


def test_what_few_problems_need_is_no_part_of_plain_kernels() -> None:
    """Positions and dropout are in kernels of their own; the log domain stands apart from those that have neither."""
    table = {row.key: row for row in cuda_resources.committed()}
    plain = {key: row for key, row in table.items() if key[0].endswith(", true>")}
    assert len(plain) == 2 * 5 * len(cuda_resources.ARCHITECTURES)
    for (name, arch), row in plain.items():
        general = table[name.replace("true", "false"), arch]
        assert row.instructions + 500 < general.instructions
        assert row.apart > 1500 or name == "attention_backward_kernel<float, 0, true>"  # it lacks registers for a call
    assert table["attention_backward_kernel<BF16, 64, true>", 90].instructions < 16_000  # all in one: 28 000


RARE = {"each_dropped", "philox", "place_chunk", "placed", "coordinate", "add_places", "store_places"}


@pytest.mark.slow
@pytest.mark.skipif(not cuda_instructions.available(), reason="needs nvcc")
@pytest.mark.parametrize("plain", [True, False])
def test_the_backward_has_what_it_needs(plain: bool) -> None:
    """No instruction of positions and dropout where there are none; operands of products come as matrices."""
    cubin = cuda_instructions.backward(plain)
    code, labels = cuda_instructions.lines(cubin, cuda_instructions.BACKWARD)
    own = code[: next(iter(cuda_resources.instructions(cubin).values()))[0]]
    assert cuda_instructions.functions(own) & RARE == (set() if plain else RARE)
    loops = cuda_instructions.product_loops(own, labels)
    assert len(loops) >= 12
    assert [cuda_instructions.ordinary_loads(loop) for loop in loops] == [[]] * len(loops)


def test_nothing_spills_and_every_architecture_is_there() -> None:
    table = cuda_resources.committed()
    assert {row.arch for row in table} == {int(arch) for arch in cuda_resources.ARCHITECTURES}
    assert [row for row in table if row.spill_stores or row.spill_loads or row.stack] == []


MOST = 2500  # instructions of a warp for 16 keys and 16 queries, T = 3, M = D = E = 64 in 16 bits
# Of L = 4096, B·H = 16.
LONG = cuda_instructions.Work(tiles=32, warps=16, blocks=1, waves=1, cluster=8, iterations=3, problems=1)


def test_the_forward_issues_few_instructions() -> None:
    found = cuda_instructions.committed()
    assert cuda_instructions.total(found) <= MOST
    assert cuda_instructions.seconds(found, GPUS["H100"], LONG) <= 30e-6
    fewer = cuda_instructions.seconds(found, GPUS["H100"], LONG._replace(iterations=1))
    assert fewer < cuda_instructions.seconds(found, GPUS["H100"], LONG)


@pytest.mark.slow
@pytest.mark.skipif(not cuda_instructions.available(), reason="needs nvcc")
def test_the_machine_code_issues_no_more_than_the_table_says() -> None:
    found = cuda_instructions.rows()
    assert [(row.phase, row.loop) for row in found] == [(row.phase, row.loop) for row in cuda_instructions.committed()]
    assert cuda_instructions.total(found) <= 1.02 * cuda_instructions.total(cuda_instructions.committed())
