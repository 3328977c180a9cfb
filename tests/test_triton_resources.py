"""Triton kernels compiled ahead of time, without a GPU: no spills, tensor cores used, no length in a binary's key."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.compiled import front_end, releases, resources
from benchmarks.compiled.gpus import AMD, FAMILIES
from benchmarks.compiled.resources import Row

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def compiling(*arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Python in a process whose kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], str]:
    """A reduced set compiled for every family, and what the command had to complain of."""
    path = tmp_path_factory.mktemp("resources") / "few.csv"
    done = compiling("-m", "benchmarks.compiled.resources", "--quick", "--out", str(path))
    assert path.exists(), done.stderr
    return resources.read(path), "" if done.returncode == 0 else done.stderr


@pytest.mark.slow
def test_no_new_spills_enough_shared_memory_and_tensor_cores_for_every_product(
    compiled: tuple[list[Row], str],
) -> None:
    rows, complaints = compiled
    assert complaints == ""
    assert {row.family for row in rows} == {*FAMILIES, "gfx942"}
    assert any(row.products for row in rows)
    known = resources.known_spills(resources.read())
    assert [fault for row in rows for fault in row.faults(known.get(resources.kind(row), 0))] == []


@pytest.mark.slow
def test_the_committed_table_is_of_these_kernels(compiled: tuple[list[Row], str]) -> None:
    rows, _ = compiled
    assert resources.stale(rows, resources.read()) == []


def test_the_committed_table_has_no_fault_but_the_spills_it_counts() -> None:
    committed = resources.read()
    assert {(row.family, row.dtype) for row in committed} == {
        *itertools.product((*FAMILIES, *AMD), ("bfloat16", "float32")),
        *itertools.product(FAMILIES, ("float16",)),
    }
    assert [fault for row in committed for fault in row.faults(known_spill=row.spill_bytes)] == []


FORWARD = (
    "parameters.prepare.parameters_prepare_kernel",
    *("attention.transport.transport_kernel", "attention.transport.transport_finish_kernel"),
    "attention.read.read_kernel",
    *("masked.keys.masked_keys_kernel", "masked.forward.masked_kernel"),
)


def test_every_kernel_is_compiled_for_every_gpu_and_spills_on_none_of_amd() -> None:
    committed = resources.read()
    kernels = {row.kernel for row in committed}
    assert len(kernels) > 25
    for family in (*FAMILIES, *AMD):
        assert {row.kernel for row in committed if row.family == family} == kernels
    assert [fault for row in committed if row.family in AMD for fault in row.faults()] == []
    assert all(row.scalar_registers > 0 for row in committed if row.family in AMD)


def test_the_forward_pass_in_half_precision_never_spills() -> None:
    rows = [row for row in resources.read() if row.kernel in FORWARD and row.dtype != "float32"]
    assert {row.kernel for row in rows} == set(FORWARD)
    assert [fault for row in rows for fault in row.faults()] == []


def test_in_half_precision_nothing_spills() -> None:
    rows = [row for row in resources.read() if row.dtype != "float32"]
    assert [fault for row in rows for fault in row.faults()] == []


@pytest.mark.parametrize("release", ["3.6.0", "3.9.0"])
def test_nor_does_it_under_other_tritons(release: str) -> None:
    """The oldest that is supported and the newest there is."""
    lines = [line for line in releases.read() if line.triton == release]
    committed = resources.read()
    assert {line.sources for line in lines} == {row.sources for row in committed}
    assert {line.kind for line in lines} == {resources.kind(row) for row in releases.halves(committed)}
    assert [line for line in lines if line.spill_bytes] == []


@pytest.mark.slow
def test_every_kernel_compiles_with_each_operand_absent_and_present() -> None:
    """And multiplies strides in 64 bits."""
    done = compiling("-m", "benchmarks.compiled.front_end")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_compiles_to_asynchronous_products_loses_none_of_their_descriptors() -> None:
    """Whatever Triton is there: each release brings a ptxas of its own."""
    done = compiling("-m", "benchmarks.compiled.uniform")
    assert done.returncode == 0, done.stderr
    assert ", 0 faults" in done.stdout


SPILLS = """
import torch
from benchmarks.compiled import resources
from benchmarks.compiled.workloads import Call

sizes = ((64, 64), (128, 64), (128, 128))
passes = ((False, 3), (True, 3), (True, 1))
calls = [Call("attention", *backward, D=d, E=d, M=m) for backward in passes for d, m in sizes]
jobs = resources.jobs(calls, "sm_90")

gates, large = ("log_decay", "initial_state"), {"D": 128, "E": 128}
placed = {**large, "given": ("position",)}
once = (  # what spilled, where
    ("sm_90 sm_100", "transport_kernel", Call("attention", kernel="dot")),
    ("sm_80", "read_kernel", Call("attention", M=128)),
    ("sm_80", "transport_columns_backward", Call("packed", True)),
    ("sm_90", "transport_keys_backward", Call("attention", True, kernel="dot")),
    ("sm_90", "transport_keys_backward", Call("packed", True, rich=True)),
    ("sm_90", "linearised_kernel", Call("linearised", rich=True)),
    ("sm_100", "linearised_finish", Call("linearised", M=256)),
    ("sm_80 sm_90", "causal_queries_backward", Call("causal", True, 1, rich=True)),
    ("sm_80", "causal_queries_backward", Call("causal", True, 1, **large)),
    ("sm_90", "causal_queries_backward", Call("packed_causal", True, 1, given=gates)),
    ("sm_80 sm_90 sm_100", "causal_gates_backward", Call("packed_causal", True, 1, given=gates)),
    ("sm_80 sm_90 sm_100", "causal_keys_backward", Call("causal", True, 1, M=128)),
    ("sm_100", "causal_sums", Call("causal", False, 1, M=128, **large)),
    ("sm_100", "causal_kernel", Call("causal", False, 1, **large)),
    ("sm_80 sm_100", "masked_kernel", Call("masked", mask="float", **large)),
    ("sm_90", "masked_keys_backward", Call("masked", True, mask="float", **large)),
    ("sm_90 sm_100", "masked_queries_backward", Call("masked", True, mask="float", rich=True)),
    ("sm_80", "masked_mask_backward", Call("masked", True, mask="float", M=128, **large)),
    ("sm_90", "masked_kernel", Call("masked", mask="float", M=128, **placed)),
    ("sm_100", "masked_keys_backward", Call("masked", True, mask="float", M=128, **placed)),
    ("sm_100", "masked_mask_backward", Call("masked", True, mask="float", M=128, **placed)),
    ("sm_80 sm_90 sm_100", "causal_queries_backward", Call("causal", True, 1, M=128, given=("epsilon",), **large)),
    ("sm_90", "causal_gates_backward", Call("causal", True, 1, M=128, given=gates, **large)),
    ("sm_100", "causal_gates_backward", Call("packed_causal", True, 1, torch.float16, given=gates)),
    ("sm_80", "read_kernel", Call("packed", M=128, **placed)),
    ("sm_100", "transport_keys_backward", Call("attention", True, M=128, **placed)),
    ("sm_90", "masked_kernel", Call("masked", dtype=torch.float16, mask="float", **large)),
    ("sm_80 sm_90 sm_100", "masked_queries_backward", Call("masked", True, mask="float", M=128, **placed)),
    ("sm_80 sm_90 sm_100", "masked_steps_backward", Call("masked", True, mask="float", M=128, **placed)),
    ("sm_90", "masked_keys_backward", Call("masked", True, mask="float", M=128, **large)),
    ("sm_100", "causal_queries_backward", Call("causal", True, 1, M=128, given=gates, **large)),
    ("sm_80", "causal_queries_backward", Call("packed_causal", True, 1, torch.float16, given=gates)),
    ("sm_90", "columns_kernel", Call("iterated", M=256)),
    ("sm_100", "columns_kernel", Call("iterated", dtype=torch.float16, M=256)),
    ("sm_80 sm_90 sm_100", "causal_kernel", Call("causal", False, 1, M=256)),
    ("sm_80 sm_90 sm_100", "causal_step_kernel", Call("step", False, 1, M=256)),
    ("sm_80 sm_90", "masked_tokens_backward", Call("masked", True, mask="float", M=256)),
    ("sm_80 sm_90", "read_backward_kernel", Call("read", True, M=128, **placed)),
    ("sm_90", "read_backward_kernel", Call("attention", True, dtype=torch.float16, M=128, **large)),
    ("sm_90 sm_100", "transport_kernel", Call("attention", M=128, **placed)),
    ("sm_80", "transport_kernel", Call("packed", dtype=torch.float16, rich=True)),
    ("sm_90 sm_100", "parameters_backward", Call("attention", True, M=128, **placed)),
    ("sm_80", "features_kernel", Call("features", **large)),
    ("sm_90 sm_100", "features_landmarks_backward", Call("features", True, rich=True)),
)
for families, kernel, call in once:
    for family in families.split():
        found = [job for job in resources.jobs([call], family) if kernel in job.variant.name]
        assert found, (family, kernel, call)
        jobs += found
rows = list(resources.build(jobs, 2))
assert not any(row.faults() for row in rows), [row.faults() for row in rows if row.faults()]
"""


@pytest.mark.slow
def test_what_attention_and_what_once_spilled_compiles_to_spills_nothing() -> None:
    """Whatever Triton is there."""
    done = compiling("-c", SPILLS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "narrow"),
    [
        ("%a = arith.muli %stride_kb, %c16_i32 : i32 loc(#loc1)", True),
        ("%a = tt.splat %stride_kn : i32 -> tensor<64xi32>\n%b = arith.muli %r, %a : tensor<64xi32>", True),
        ("%a = arith.extsi %stride_kb : i32 to i64\n%b = arith.muli %a, %c16_i64 : i64", False),
        ("%a = arith.muli %program, %c16_i32 : i32", False),
    ],
)
def test_products_of_strides_in_32_bits_are_found(line: str, narrow: bool) -> None:
    assert bool(front_end.narrow_products(line)) == narrow


KEYS = """
import json, sys
from benchmarks.compiled import aot, workloads
from benchmarks.compiled.workloads import Call

shapes = [(1, 16, length) for length in (1, 16, 17, 1000, 1001, 1024, 4096, 65536)] + [(3, 5, 1000), (64, 1, 100)]
shapes += [(1, 8, 65536), (1, 1, 262144)]  # heads in parts, a head in stretches of its length
found = {}
for op in ("attention", "pool", "causal", "features"):
    for backward in (False, True):
        for rich in (False, True):
            call = dict(op=op, backward=backward, rich=rich, T=1 if op == "causal" else 3)
            found[f"{op} {backward} {rich}"] = [
                sorted((v.name, v.key) for v in aot.variants(
                    workloads.launches(Call(B=B, H=H, L=L, **call), "sm_90"), "sm_90"))
                for B, H, L in shapes
            ]
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
def test_a_new_length_or_batch_compiles_nothing_new() -> None:
    done = compiling("-c", KEYS)
    assert done.returncode == 0, done.stderr
    for call, by_shape in json.loads(done.stdout).items():
        # Of one batch element, and of several: in one part, causal parameters' gradients are added with a kernel less.
        # And of few heads, whose long scans go side by side, by kernels of their own.
        known = [tuple(key) for keys in (by_shape[4], by_shape[8], by_shape[10]) for key in keys]
        for keys in by_shape:
            assert [tuple(key) for key in keys if tuple(key) not in known] == [], call


def row(**changes: object) -> Row:
    values = {name: "" if kind == "str" else 0 for name, kind in Row.__annotations__.items()}
    return Row(**{**values, "family": "sm_90", "shared_limit": 100, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"products": 2, "tensor_instructions": "HMMA:4"}, ""),
        ({"spill_bytes": 8}, "spilled"),
        ({"shared_bytes": 101}, "shared memory"),
        ({"products": 1}, "without tensor cores"),
        ({"products": 2, "fma_products": 1, "tensor_instructions": "HMMA:4"}, "without tensor cores"),
    ],
)
def test_faults_are_named(changes: dict[str, object], fault: str) -> None:
    faults = row(**changes).faults()
    assert (fault in faults[0]) if fault else faults == []


def test_a_stale_table_says_how_to_renew_it(tmp_path: Path) -> None:
    before = row(sources=resources.sources_hash(), registers=40, key="k")
    resources.write([before], tmp_path / "table.csv")
    committed = resources.read(tmp_path / "table.csv")
    assert committed == [before]
    assert resources.stale([before], committed) == []
    assert resources.REGENERATE in resources.stale([row(registers=41, key="k")], committed)[0]
    assert resources.REGENERATE in resources.stale([], [row(sources="another")])[0]
