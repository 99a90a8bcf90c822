"""Limits on results: held by the interval, not by the estimate, and an exit code of their own where they are not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command import cli
from tests.evals.gsm8k.test_compare import command, pair
from tests.evals.kld.llamas import LETTERS, make_llama, measure
from w8a8.errors import LimitError, UsageError
from w8a8.evals.gsm8k.compare import compare
from w8a8.evals.limits import judge_comparison, judge_kld, share


@pytest.mark.parametrize(
    ("counts", "at_most", "broken"),
    [
        ((900, 20, 60, 339), 0.0, ""),  # a gain
        ((900, 35, 31, 353), 0.02, ""),
        ((900, 35, 31, 353), 0.01, "a loss of up to 1.5 points is not ruled out; more questions narrow the interval"),
        ((900, 60, 20, 339), 0.01, "-3.0 points of 1,319 questions"),
        ((10, 0, 0, 2), 0.01, "a loss of up to 25.0 points is not ruled out"),  # 12 questions show nothing
        ((900, 0, 3, 339), 0.001, "a loss of up to 0.2 points is not ruled out"),  # no loss seen among 1,242
        ((0, 0, 0, 12), 1.0, "neither model answers any of the 12 questions right"),
    ],
)
def test_a_loss_is_held_by_the_interval(counts: tuple[int, int, int, int], at_most: float, broken: str) -> None:
    found = compare(*pair(*counts))
    limit = judge_comparison(found, at_most)
    assert bool(limit.broken) == bool(broken)
    assert broken in limit.broken
    assert limit.bound == found.loss >= -found.interval[0]


def test_failed_requests_of_the_base_hold_nothing() -> None:
    base, quant = pair(900, 20, 60, 339)
    base["outcomes"][-1]["error"] = "no luck"
    assert "the base has 1 failed request" in judge_comparison(compare(base, quant), 0.5).broken


@pytest.mark.parametrize(
    ("text", "found"), [("1%", 0.01), ("0.01", 0.01), ("0", 0.0), ("100%", 1.0), (" 0.5% ", 0.005)]
)
def test_a_share_is_read(text: str, found: float) -> None:
    assert share(text, "--at-most-worse") == found


@pytest.mark.parametrize("text", ["", "101%", "2", "-1%", "1 point", "nan", "1e-3"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--at-most-worse"):
        share(text, "--at-most-worse")


def test_a_divergence_is_held_by_the_interval(tmp_path: Path) -> None:
    one, two = make_llama(tmp_path / "one", seed=1), make_llama(tmp_path / "two", seed=2)
    found = measure(one, two, tokens=50)
    low, high = found.mean_interval
    assert low < found.mean < high
    assert judge_kld(found, high).broken == ""
    between = judge_kld(found, (found.mean + high) / 2).broken
    assert "more --tokens narrow the interval" in between
    above = judge_kld(found, found.mean / 2).broken
    assert "--recipe auto" in above
    assert "narrow" not in above
    assert judge_kld(replace(found, mean=0.0, mean_interval=(0.0, 0.0)), 0.0).broken == ""

    book = tmp_path / "book.txt"
    book.write_text(LETTERS.documents[0])
    done = cli("eval", "kld", one, two, "--text", book, "--at-most", "1e-6", "--json", "--quiet")
    assert done.returncode == LimitError.exit_code
    printed = json.loads(done.stdout)
    assert printed["limit"]["held"] is False
    assert printed["limit"]["bound"] == printed["kl"]["interval"][1] > 1e-6
    (line,) = done.stderr.splitlines()
    assert line == f"w8a8: error: {printed['limit']['broken']}"


def test_compare_ends_with_the_code_and_still_prints(tmp_path: Path) -> None:
    done = command(tmp_path, *pair(900, 60, 20, 339), "--at-most-worse", "1%")
    assert done.returncode == LimitError.exit_code
    assert "The quantized model answers fewer" in done.stdout
    assert "--at-most-worse 1% is not held: -3.0 points" in done.stderr
    held = command(tmp_path, *pair(900, 60, 20, 339), "--at-most-worse", "5%", "--json")
    assert held.returncode == 0, held.stderr
    assert json.loads(held.stdout)["limit"] == {
        "at_most": 0.05,
        "bound": pytest.approx(0.042, abs=0.005),
        "broken": "",
        "held": True,
    }
    assert command(tmp_path, *pair(9, 1, 1, 1), "--at-most-worse", "few").returncode == UsageError.exit_code
