"""The performance model: counts against the design's own figures, machine code read right, no GPU needed."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.compiled import model, model_resident, sass
from benchmarks.compiled.gpus import COPY_SHARE, GPUS, resident_blocks
from benchmarks.compiled.sass import Instruction
from benchmarks.compiled.workloads import Call

ROOT = Path(__file__).resolve().parents[1]
H200 = GPUS["H200"]
LONG = Call("attention", L=65536, T=3)


def moves(call: Call) -> float:
    """Bytes of all stages in units of one token tensor."""
    return sum(stage.bytes for stage in model.stages(call)) / (2 * call.B * call.H * call.L * call.D)


def test_streaming_reads_the_keys_once_per_iteration() -> None:
    assert moves(replace(LONG, T=1)) == 4
    assert moves(replace(LONG, T=0)) == 4
    assert moves(LONG) == 6
    assert moves(replace(LONG, T=1, backward=True)) == 7
    assert moves(replace(LONG, backward=True)) == 10


def test_the_floor_at_64k_is_the_designs() -> None:
    """Copy floor 125, streaming bytes 187, exponentials 138 µs."""
    found = model.limits(model.total("", model.stages(LONG)), H200)
    assert model.copy_floor(LONG, H200, 4) == pytest.approx(125e-6, rel=0.01)
    assert found["bytes"] == pytest.approx(187e-6, rel=0.01)
    assert found["exps"] == pytest.approx(138e-6, rel=0.01)


def test_the_resident_forward_moves_what_a_copy_moves() -> None:
    call = Call("attention", L=4096, T=3)
    tensors = 2 * call.B * call.H * call.L * (2 * call.D + 2 * call.E)
    assert tensors <= model.resident(call).bytes <= 1.1 * tensors
    assert model.resident(call).bytes - model.resident(replace(call, T=1)).bytes == 4 * call.B * call.H * call.M * 2
    assert "| resident forward |" in model.stage_table(4096, 3)


def test_the_resident_backward_moves_what_a_copy_moves() -> None:
    call = Call("attention", L=4096, T=3, B=9)
    tensors = 2 * call.B * call.H * call.L * 11 * call.D
    both = model.resident(call).bytes + model.resident_backward(call).bytes
    assert tensors <= both <= 1.1 * tensors
    assert model.resident_backward(call).bytes > model.resident_backward(call, groups=1).bytes
    assert model.resident_backward(call).exps == model.resident_backward(replace(call, T=1)).exps
    assert "| resident backward |" in model.stage_table(4096, 3)


@pytest.mark.slow
def test_layouts_are_the_hosts_own() -> None:
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("needs g++ and make")
    call = Call("attention", L=4096, T=3, backward=True)
    alone = replace(call, backward=False)
    fits, forward, not_ = model_resident.layouts((call, alone, replace(call, L=100_000)), H200)
    assert (fits.cluster, forward.cluster, not_.cluster) == (8, 8, 0)
    assert fits.warps == 8  # rows of logits without padding leave room for the tokens of so many
    assert max(fits.shared, forward.shared) <= 227 * 1024
    assert forward.narrow_warps == 16  # of a block that has a processor to itself
    assert 0 < model_resident.forward_seconds(alone, forward, H200) <= 30e-6
    assert model_resident.second_reads(call, fits) > 2 * call.H * call.L * (call.D + call.E)
    assert model_resident.table(H200, 3).count("|\n") == len(model_resident.SIZES) + 1


def test_products_of_a_forward() -> None:
    call = Call("attention", L=100, T=1, B=2, H=3, D=8, E=4, M=5)
    assert model.total("", model.stages(call)).flops == 2 * 3 * 2 * 100 * 5 * (8 + 4) * 2  # keys, pool, queries, read


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(32, 0, 4, 16), (128, 0, 4, 4), (255, 0, 4, 2), (64, 100 * 1024, 4, 2), (168, 40 * 1024, 8, 1)],
)
def test_blocks_that_fit_a_multiprocessor(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert resident_blocks("sm_90", registers, shared, warps) == blocks


def instruction(n: int, opcode: str, target: int | None = None, conditional: bool = False, **c: int) -> Instruction:
    control = {"stall": 1, "write_barrier": 7, "read_barrier": 7, "waits": 0} | c
    return Instruction(16 * n, opcode, target, conditional, **control)


# 0: load; 1: if not rare jump to 3; 2: the rare way; 3: product; 4: back to 0; 5: end
CODE = [
    instruction(0, "LDG.E.128", write_barrier=0),
    instruction(1, "BRA", 48, True),
    instruction(2, "MUFU.EX2"),
    instruction(3, "HMMA.16816.F32.BF16", waits=1, stall=2),
    instruction(4, "BRA", 0, True, stall=5),
    instruction(5, "EXIT"),
]


def test_the_main_loop_is_the_hot_path_through_the_tensor_cores() -> None:
    body = sass.main_loop(CODE)
    assert [i.address // 16 for i in body] == [0, 1, 3, 4]
    counts = sass.count(body)
    assert (counts["all"], counts["tensor"], counts["ex2"], counts["LDG.128"]) == (4, 1, 0, 1)


def test_a_warp_waits_for_what_it_loads() -> None:
    assert sass.loop_cycles(sass.main_loop(CODE)) == sass.LATENCY["LDG"] + 2 + 5
    assert sass.loop_cycles([instruction(n, "FFMA", stall=4) for n in range(3)]) == 12
    assert sass.loop_cycles([]) == 0


def test_the_scheduling_of_an_instruction_is_decoded() -> None:
    line = "        /*1bd0*/              @!P2 BRA 0x1c20 ;      /* 0x0000000000107947 */"
    match = sass._LINE.search(line)
    assert match is not None
    high = (5 | 2 << 5 | 7 << 8 | 0b100001 << 11) << 41
    found = sass._decode(match, high)
    assert found == Instruction(0x1BD0, "BRA", 0x1C20, True, 5, 2, 7, 0b100001)


def test_bytes_count_each_touched_storage_once() -> None:
    ttir = "tt.func public @k(%a: !tt.ptr<f32> loc, %b: !tt.ptr<f32>, %n: i32) {\n %0 = tt.load %a\n}"
    assert model._touched(ttir) == (True, False)
    a, b = torch.empty(10, 4), torch.empty(3)
    launch = SimpleNamespace(args=(a, b, 7))
    assert model._moved(launch, (True, True)) == 160 + 12
    assert model._moved(launch, (True, False)) == 160
    assert model._moved(SimpleNamespace(args=(a[:, :1].expand(10, 4), a)), (True, True)) == 160
    assert model._moved(SimpleNamespace(args=((a, None, 0.5), 7, b)), (False, True)) == 12  # a group of arguments


def test_a_prediction_is_limited_by_its_slowest_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    code = model.Code(64, 0, (True,), {"all": 1000, "ex2": 100}, 500, {}, 0)
    monkeypatch.setattr(model, "_code", lambda *key: code)
    tokens = torch.empty(132 * 64 * 64, dtype=torch.float32)
    params = [SimpleNamespace(name="tokens"), SimpleNamespace(name="stretch")]
    tile = SimpleNamespace(rows=64, warps=4)
    launch = SimpleNamespace(kernel=SimpleNamespace(params=params), programs=1320, args=(tokens, 640), tile=tile)
    found = model.predict(launch, "k", "key", H200)
    assert found.bound == "issue"  # 4 warps of 1000 instructions over 4 schedulers: 1000 cycles, exps 800
    assert found.seconds == pytest.approx(model.LAUNCH_S + 10 * 10 * 1000 / H200.clock)
    monkeypatch.setattr(model, "_code", lambda *key: code._replace(loop={"all": 1}, loop_cycles=1))
    slow = replace_args(launch, (torch.empty(10**8), 640))
    assert model.predict(slow, "k", "key", H200).bound == "bytes"
    assert model.predict(slow, "k", "key", H200).seconds == pytest.approx(
        model.LAUNCH_S + 4e8 / (COPY_SHARE * H200.bandwidth)
    )


def replace_args(launch: SimpleNamespace, args: tuple[object, ...]) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(launch), "args": args})


def test_floors_alone_need_no_triton(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "floor.csv"
    assert model.main(["--floor", "--gpu", "H200", "--gpu", "A100", "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 * 2  # GPUs, modes, lengths, T
    assert all(math.isnan(float(row["us_predicted"])) for row in rows)
    assert "| H200 | forward | 65536 | 3 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_prediction_lies_above_its_floor() -> None:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.compiled.model",
        "--gpu",
        "H200",
        "--L",
        "16384",
        "--T",
        "1",
        "--forward",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("| H200 | forward | 16384 | 1 |")]
    floor, predicted = float(line.split("|")[6]), float(line.split("|")[8])
    assert floor < predicted < 10 * floor
