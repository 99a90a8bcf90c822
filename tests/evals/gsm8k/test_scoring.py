"""Scores of answers; on the same answers, lm-evaluation-harness's `gsm8k` filters and metric give the same."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters import build_filter_ensemble

from w8a8.evals.gsm8k.scoring import flexible, strict

TASK: Any = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text())
THEIR_NAMES = {"strict": "strict-match", "flexible": "flexible-extract"}
OURS = {"strict": strict, "flexible": flexible}


def ours(score: str, answer: str, gold: str) -> bool:
    return OURS[score](answer) == strict(f"#### {gold}")


def theirs(score: str, answer: str, gold: str) -> bool:
    """What lm-eval's own task makes of it: its filters, then its metric with its options."""
    (filters,) = (f["filter"] for f in TASK["filter_list"] if f["name"] == THEIR_NAMES[score])
    steps = [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in filters]
    instance = Instance("generate_until", {}, (), 0, resps=[answer])
    build_filter_ensemble(score, steps).apply([instance])
    options = {k: v for k, v in TASK["metric_list"][0].items() if k in ("regexes_to_ignore", "ignore_case")}
    said = instance.filtered_resps[score]
    found = exact_match_fn(predictions=[said], references=[f"Reasons: 3.\n#### {gold}"], **options)
    return bool(found["exact_match"])


RECORDED = [
    ("She sold 48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72 in all.\n#### 72", "72"),
    ("She sold 48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=71>>71 in all.\n#### 71", "72"),
    ("12/60 = $0.2 a minute, so 50 x 0.2 = $10.\n#### 10", "10"),
    ("#### 10", "10"),
    ("#### 10.", "10"),
    ("#### 1,080", "1080"),
    ("#### 1,080", "1,080"),
    ("#### 1080", "1,080"),
    ("#### 109,200,000", "109,200,000"),
    ("#### 109,200,001", "109,200,000"),
    ("#### -5", "-5"),
    ("#### -5", "5"),
    ("#### 5", "-5"),
    ("#### 0.5", "0.5"),
    ("#### 0.5 liters", "0.5"),
    ("#### 18 apples", "18"),
    ("#### 18%", "18"),
    ("#### 18\n\nI hope that this helps!", "18"),
    ("First #### marks the result.\n#### 18", "18"),
    ("The answer is 18.", "18"),
    ("The answer is $18.", "18"),
    ("The answer is $1,080.", "1080"),
    ("The answer is **18**", "18"),
    ("The answer is \\boxed{18}", "18"),
    ("The answer is 18%", "18"),
    ("The answer is -18", "-18"),
    ("The answer is - 18", "18"),
    ("So 3 + 4 = 7", "7"),
    ("So 3+4=7 and 7*2=14 eggs", "14"),
    ("So 3+4=7 and 7*2=14 eggs", "7"),
    ("18 eggs, and none are left", "18"),
    ("It takes 2.5 hours", "2.5"),
    ("It takes 2.5 hours", "25"),
    ("Seventeen", "17"),
    ("", "17"),
    ("####", "17"),
    ("#### none", "17"),
    ("#### x = 17", "17"),
    ("Let me think step by step. Ann has 3 pears and", "3"),
    ("1\n2\n3", "3"),
    ("Zeit: 7 Stunden – das ist alles\n#### 7", "7"),
    ("¥7", "7"),
]


@pytest.mark.parametrize("score", OURS)
def test_recorded_answers_score_as_in_lm_eval(score: str) -> None:
    differing = {
        (answer, gold) for answer, gold in RECORDED if ours(score, answer, gold) != theirs(score, answer, gold)
    }
    known = {(answer, gold) for of, answer, gold, _ in DIFFERENCES if of == score}
    assert differing == known & set(RECORDED)
    assert {ours(score, answer, gold) for answer, gold in RECORDED} == {True, False}


DIFFERENCES = [
    # we take what follows the mark, a currency sign, a space more or less, and markup; lm-eval's pattern does not
    ("strict", "#### $18", "18", True),
    ("strict", "####18", "18", True),
    ("strict", "#### **18**", "18", True),
    ("strict", "#### x = 17", "17", True),
    # we compare numbers, lm-eval compares text
    ("strict", "#### 18.00", "18", True),
    ("flexible", "The answer is 18.00", "18", True),
    ("strict", "#### 18..", "18", True),
    ("flexible", "I get 18...", "18", True),
    ("flexible", "I get 18, and so on ...", "18", True),
    # with more than one mark we take the last, lm-eval the first that a number follows
    ("strict", "#### 5\nNo, wait:\n#### 18", "18", True),
    ("strict", "#### 18\nWhat follows #### is the result.", "18", False),
    # 10-18 is a range or a subtraction here, and the number -18 there
    ("flexible", "between 10-18", "18", True),
    ("flexible", "10-18", "-18", False),
]


@pytest.mark.parametrize(("score", "answer", "gold", "right"), DIFFERENCES)
def test_these_and_only_such_answers_score_otherwise(score: str, answer: str, gold: str, right: bool) -> None:
    assert ours(score, answer, gold) is right
    assert theirs(score, answer, gold) is not right


words = st.lists(st.sampled_from(["so", "she", "has", "pears", "left", "in", "all"]), min_size=1, max_size=4)
numbers = st.one_of(st.integers(-50, 50), st.integers(-(10**7), 10**7))
spelled = st.builds(lambda value, commas: f"{value:,}" if commas else str(value), numbers, st.booleans())
sentences = st.builds(
    lambda before, number, after: f"{' '.join(before)} {number} {' '.join(after)}.", words, spelled, words
)
endings = st.one_of(
    st.builds(lambda number, stop: f"\n#### {number}{stop}", spelled, st.sampled_from(["", ".", " pears", "\nBye."])),
    st.builds(lambda number: f" The answer is {number}.", spelled),
    st.builds(lambda number: f" The answer is ${number}.", spelled.filter(lambda text: text[0] != "-")),
    st.just(""),
)


@given(st.lists(sentences, max_size=3).map("\n".join), endings, spelled, st.booleans())
def test_answers_in_words_and_whole_numbers_score_as_in_lm_eval(
    reasons: str, ending: str, gold: str, meant: bool
) -> None:
    answer = reasons + ending
    if meant and (found := flexible(answer)) is not None:
        gold = str(found)
    for score in OURS:
        assert ours(score, answer, gold) == theirs(score, answer, gold)


@pytest.mark.parametrize(
    "spelling",
    [
        "1080",
        "1,080",
        "1080.",
        "1,080.00",
        "$1,080",
        "$ 1,080",
        "€1080",
        "£1080.0",
        "1080%",
        "**1,080**",
        "01080",
        "1080 $",
    ],
)
def test_one_number_in_many_spellings(spelling: str) -> None:
    assert strict(f"#### {spelling}") == flexible(f"It is {spelling}") == Decimal(1080)


@pytest.mark.parametrize("spelling", ["-5", "−5", "-$5", "$-5", "-5.0"])
def test_negative_numbers(spelling: str) -> None:
    assert strict(f"#### {spelling}") == flexible(f"It is {spelling}") == Decimal(-5)


@pytest.mark.parametrize(
    ("spelling", "value"), [("0.5", "0.5"), (".5", "0.5"), ("$2.50", "2.5"), ("3.14159", "3.14159")]
)
def test_decimals(spelling: str, value: str) -> None:
    assert strict(f"#### {spelling}") == flexible(f"It is {spelling}") == Decimal(value)


@given(st.text())
def test_any_text_can_be_scored(answer: str) -> None:
    assert isinstance(strict(answer), Decimal | None)
    assert isinstance(flexible(answer), Decimal | None)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9), st.text())
def test_what_stands_before_the_mark_does_not_matter_to_the_strict_score(value: Decimal, before: str) -> None:
    assert strict(f"{before}\n#### {value:,}") == value
