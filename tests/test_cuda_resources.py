"""nvcc compiles every CUDA kernel for every architecture, and none needs more than the committed table says."""

from __future__ import annotations

import pytest

from benchmarks.compiled import cuda_resources


@pytest.mark.slow
@pytest.mark.skipif(not cuda_resources.available(), reason="needs nvcc")
def test_no_kernel_needs_more_than_the_table_allows() -> None:
    allowed = {row.key: row for row in cuda_resources.committed()}
    found = {row.key: row for row in cuda_resources.rows()}
    assert found.keys() == allowed.keys()
    for key, row in found.items():
        assert all(new <= old for new, old in zip(row[2:], allowed[key][2:], strict=True)), (row, allowed[key])


def test_nothing_spills_and_every_architecture_is_there() -> None:
    table = cuda_resources.committed()
    assert {row.arch for row in table} == {int(arch) for arch in cuda_resources.ARCHITECTURES}
    assert [row for row in table if row.spill_stores or row.spill_loads or row.stack] == []
