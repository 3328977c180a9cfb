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
        assert all(new <= old for new, old in zip(row[2:], allowed[key][2:], strict=True)), (row, allowed[key])


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
