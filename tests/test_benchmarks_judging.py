"""Arithmetic of the benchmarks on made-up samples: quartiles, paired ratios, rounds, break-even, verdicts, CSV."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.common.cases import BOTH, FORWARD, MODES, AttentionCase, Entry, full_plan, quick_plan
from benchmarks.common.measure import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    interleave,
    paired_ratio,
    quartiles,
    repeats_for,
    rounds_for,
)
from benchmarks.common.results import COLUMNS, OK, SKIPPED, Row, Stamp, read_csv, write_csv
from benchmarks.common.targets import MET, NOT_MET, UNMEASURED, break_even
from benchmarks.cpu import table
from benchmarks.cpu.runner import Run

STAMP = Stamp("abc", "a CPU", "avx2", 2, "cpu", "2.13.0", "3.11", "2026-01-01")


def timed(impl, T=None, case="headline", mode=FORWARD, L=4096, **columns):
    return Row(case, impl, mode, "time", "s", OK, T=T, B=1, H=8, L=L, M=64, D=64, runs=5, **columns)


def verdicts(rows):
    return {target.what: target.verdict(target.measure(rows)) for target in table.TARGETS}


def test_quartiles():
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_ratio_is_taken_inside_each_round():
    # The machine is ten times slower in the middle round: the ratio of medians would be 2, as would the paired one,
    # but the spread of the paired ratio does not see the disturbance.
    baseline, other = [1.0, 10.0, 1.0], [2.0, 20.0, 2.0]
    assert paired_ratio(other, baseline) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0], [1.0, 2.0])


def test_rounds_fit_the_budget_within_bounds():
    assert rounds_for([10.0], 1.0) == MIN_ROUNDS
    assert rounds_for([1e-6], 100.0) == MAX_ROUNDS
    assert rounds_for([0.5, 0.5], 10.0) == 10
    assert rounds_for([0.05], 1.0) == 10  # a short call is preceded by an untimed one
    assert repeats_for(1e-4) == 20
    assert repeats_for(1.0) == 1


def test_rounds_are_interleaved():
    order = []
    ticks = {"a": 0.2, "b": 0.4}

    def clock(call, repeats):
        call()
        return ticks[order[-1]]

    samples = interleave({name: (lambda name=name: order.append(name)) for name in ticks}, 1.8, clock)
    assert samples == {"a": [0.2] * 3, "b": [0.4] * 3}
    assert order[-6:] == ["a", "b"] * 3


def test_break_even():
    assert break_even([64, 128, 256], [0.25, 0.5, 2.0]) == pytest.approx(math.sqrt(128 * 256))
    assert break_even([64, 128, 256], [1.2, 2.0, 4.0]) == 64
    assert break_even([64, 128], [0.25, 0.5]) == math.inf
    assert break_even([64, 128, 256], [2.0, 0.5, 2.0]) > 128, "ahead only from where it stays ahead"


@pytest.mark.parametrize(("ratio", "verdict"), [(25.0, MET), (24.9, NOT_MET), (math.nan, UNMEASURED)])
def test_verdict_of_a_ratio(ratio, verdict):
    row = timed("sdpa", ratio=ratio, ratio_q25=20.0, ratio_q75=30.0, ratio_t1=50.0)
    assert verdicts([row])["forward, L = 4096, against `F.scaled_dot_product_attention`"] == verdict


def test_skipped_rows_and_other_lengths_judge_nothing():
    rows = [
        dataclasses.replace(timed("sdpa", ratio=100.0), status=SKIPPED),
        timed("reference", T=3, L=256, ratio=100.0),
        timed("set", T=3, case="memory", L=512, median=1.0, work=1e9),
    ]
    assert set(verdicts(rows).values()) == {UNMEASURED}


def rate(impl, q75, case="probe"):
    return Row(case, impl, "", "rate", "FLOP/s", OK, q75=q75, runs=9)


def test_share_of_peak():
    rows = [timed("set", T=3, median=0.01, work=2e9), rate("fma peak", 300e9), rate("fma peak", 400e9, "headline")]
    assert table.peak_share(rows).value == pytest.approx(50)
    assert table.peak_share([*rows, rate("matmul", 500e9)]).value == pytest.approx(40), "a matmul is FMAs too"
    assert table.peak_share([rows[0], rate("matmul", 500e9)]) is None


def test_a_share_above_the_peak_is_no_measurement():
    rows = [timed("set", T=3, median=0.01, work=2e9), rate("fma peak", 100e9)]
    assert verdicts(rows)["share of the FMA peak measured in the same run, forward"] == UNMEASURED


def test_memory_is_judged_by_its_worst_case():
    def memory(L, extra):
        return timed("set", T=3, case="memory", mode=BOTH, L=L, median=extra, work=100.0)

    good, bad = memory(4096, 20.0), memory(16384, 30.0)
    assert table.memory_share([good]).value == pytest.approx(0.2)
    name = "peak extra memory, forward + backward, × (q, k, v, o)"
    assert verdicts([good])[name] == MET
    assert verdicts([good, bad])[name] == NOT_MET


def test_sinkhorn_is_judged_by_its_worst_case():
    rows = [timed("pot", T=20, case="sinkhorn", ratio=r) for r in (30.0, 9.0)]
    assert verdicts(rows)["`sinkhorn` against POT (`ot.batch`)"] == NOT_MET
    assert verdicts(rows[:1])["`sinkhorn` against POT (`ot.batch`)"] == MET


def test_break_even_with_sdpa_uses_the_sweep():
    rows = [timed("sdpa", case="sweep", L=L, ratio=r) for L, r in ((64, 0.5), (128, 1.5), (256, 3.0))]
    assert verdicts(rows)["break-even with SDPA, forward"] == MET
    assert table.sdpa_break_even(rows[:1], FORWARD).value == math.inf


def test_csv_round_trip(tmp_path):
    rows = [
        timed("set", T=3, median=1.5e-3, q25=1e-3, q75=2e-3, ratio=1.0),
        dataclasses.replace(timed("elu"), status=SKIPPED),
    ]
    write_csv(tmp_path / "x.csv", rows, STAMP)
    back, stamp = read_csv(tmp_path / "x.csv")
    assert stamp["cpu"] == "a CPU"
    assert (tmp_path / "x.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    for before, after in zip(rows, back, strict=True):
        assert repr(before) == repr(after)  # NaN is not equal to itself
    (tmp_path / "y.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a results file"):
        read_csv(tmp_path / "y.csv")


def test_slow_implementations_are_skipped_by_what_the_last_length_took():
    run = Run(full_plan(), threads=1)
    sdpa, linear = Entry("sdpa", None), Entry("reference", 3)
    run.last = {("", FORWARD, sdpa): (1024, 1.0), ("", FORWARD, linear): (1024, 1.0)}
    case = AttentionCase("sweep", 4096, FORWARD)
    assert "more than" in run._refusal(case, sdpa)
    assert run._refusal(case, linear) == ""
    assert run._refusal(dataclasses.replace(case, mode=BOTH), sdpa) == ""
    assert run._refusal(dataclasses.replace(case, mask="causal"), sdpa) == ""


def test_plans_cover_what_the_table_needs():
    plan = full_plan()
    swept = {(case.mode, case.L) for case in plan.attention if case.name == "sweep"}
    assert swept == {(mode, 2**n) for mode in MODES for n in range(6, 17)}
    assert {case.mode for case in plan.attention if case.L == table.HEADLINE_LENGTH and case.name == "headline"} == set(
        MODES
    )
    assert all(case.L >= table.MEMORY_MIN_LENGTH for case in plan.memory)
    assert not quick_plan().compile


def test_work_counts():
    case = AttentionCase("x", 10, FORWARD, B=2, H=3, D=4, E=5, M=7)
    products = [(10, 4, 7), (10, 4, 7), (7, 10, 5), (10, 7, 5)]  # logits of keys and queries, pool, read
    assert case.matmul_flops() == 2 * 3 * sum(2 * a * b * c for a, b, c in products)
    assert case.qkvo_bytes() == 4 * 2 * 3 * 10 * (4 + 4 + 5 + 5)
