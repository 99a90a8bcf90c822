"""`w8a8 compare`: paired results of the same questions."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.command import cli
from w8a8.errors import InvalidResultError, UsageError
from w8a8.evals.asking import Reply
from w8a8.evals.gsm8k.compare import compare
from w8a8.evals.gsm8k.questions import Question
from w8a8.evals.gsm8k.results import read
from w8a8.evals.gsm8k.run import Outcome, Protocol, Result

PROTOCOL: dict[str, Any] = {
    "shots": 8,
    "endpoint": "chat",
    "temperature": 0.0,
    "max_tokens": 512,
    "concurrency": 16,
    "prompt_sha256": "a",
    "questions_sha256": "b",
}


def result(right: Sequence[bool], model: str = "model", **how: Any) -> dict[str, Any]:
    """A result as an evaluation writes it, with so many questions answered right or wrong."""
    questions = [Question(f"How much is {i} and 1?", f"#### {i + 1}") for i in range(len(right))]
    replies = [Reply(f"It is {i + 1 + (not good)}.\n#### {i + 1 + (not good)}", "stop") for i, good in enumerate(right)]
    return Result(
        model=model,
        base_url="http://localhost:8000/v1",
        protocol=Protocol(**{**PROTOCOL, "questions": len(right), **how}),
        versions={},
        started="2026-01-01T00:00:00+00:00",
        seconds=1,
        outcomes=[Outcome(i, q, r) for i, (q, r) in enumerate(zip(questions, replies, strict=True))],
        path=Path("unused"),
    ).to_dict()


def pair(both: int, only_base: int, only_quant: int, neither: int) -> tuple[dict[str, Any], dict[str, Any]]:
    counts = (both, only_base, only_quant, neither)
    patterns = [(True, True), (True, False), (False, True), (False, False)]
    pairs = [pattern for pattern, count in zip(patterns, counts, strict=True) for _ in range(count)]
    return result([a for a, _ in pairs], "base"), result([b for _, b in pairs], "quant")


@pytest.mark.slow
@settings(max_examples=25)
@given(*[st.integers(0, 30)] * 3, st.integers(1, 30))
def test_pairs_are_counted_and_the_counts_add_up(both: int, base: int, quant: int, neither: int) -> None:
    found = compare(*pair(both, base, quant, neither))
    assert (found.both_right, found.only_base, found.only_quant, found.both_wrong) == (both, base, quant, neither)
    assert found.difference == pytest.approx((quant - base) / found.questions)
    assert found.interval[0] <= found.difference <= found.interval[1]
    assert found.jaccard == (both / (both + base + quant) if both + base + quant else 1)
    assert [flip.right for flip in found.flips] == ["base"] * base + ["quant"] * quant


def test_flips_hold_both_answers() -> None:
    (flip,) = compare(*pair(2, 1, 0, 2)).flips
    assert (flip.index, flip.question, flip.gold) == (2, "How much is 2 and 1?", "3")
    assert (flip.base_answer, flip.quant_answer) == ("It is 3.\n#### 3", "It is 4.\n#### 4")


def without_texts(result: dict[str, Any]) -> dict[str, Any]:
    """The result as `--no-texts` writes it."""
    texts = {"question", "answer"}
    slim = [{name: o[name] for name in o if name not in texts} for o in result["outcomes"]]
    return {**result, "outcomes": slim}


def test_results_without_texts_compare_alike(tmp_path: Path) -> None:
    base, quant = pair(5, 4, 3, 2)
    whole = compare(base, quant).to_dict()
    for file, found in (("base", base), ("quant", quant)):
        (tmp_path / f"{file}.json").write_text(json.dumps(without_texts(found)))
    slim, left_out = read(tmp_path / "base.json"), read(tmp_path / "quant.json")
    for first, second in ((slim, left_out), (base, left_out), (slim, quant)):
        found = compare(first, second).to_dict()
        assert {**found, "flips": ()} == {**whole, "flips": ()}
        assert [flip["gold"] for flip in found["flips"]] == [flip["gold"] for flip in whole["flips"]]
    shown = cli("compare", tmp_path / "base.json", tmp_path / "quant.json", "--flips", "1", check=True).stdout
    assert "question 5" in shown
    assert "left out" in shown
    with pytest.raises(UsageError, match="questions_sha256"):
        compare(slim, {**left_out, "protocol": {**left_out["protocol"], "questions_sha256": "c"}})


def test_without_order_in_the_files() -> None:
    base, quant = pair(5, 4, 3, 2)
    shuffled = {**quant, "outcomes": quant["outcomes"][::-1]}
    assert compare(base, shuffled) == compare(base, quant)


@pytest.mark.parametrize(
    ("counts", "beginning", "holds"),
    [
        (
            (900, 60, 20, 339),
            "The quantized model answers fewer of these questions right: 69.7% against 72.8%",
            "p = 9e-06",
        ),
        ((900, 20, 60, 339), "The quantized model answers more of these questions right", "+3.0 points"),
        ((900, 35, 31, 353), "No difference shown: 70.6% against 70.9% of 1,319 questions", "is not ruled out"),
        ((8, 3, 0, 1), "No difference shown", "only 3 questions were answered differently, too few to show one"),
        ((8, 1, 0, 1), "No difference shown", "only 1 question was answered differently"),
        ((0, 0, 0, 12), "Nothing to compare", "neither model answers any of the 12 questions right"),
        ((10, 0, 0, 2), "No difference shown: both get the same 83.3% of 12 questions right", "up to 25.0% of such"),
    ],
)
def test_the_verdict_says_no_more_than_the_data(counts: tuple[int, int, int, int], beginning: str, holds: str) -> None:
    verdict = compare(*pair(*counts)).verdict
    assert verdict.startswith(beginning)
    assert holds in verdict
    assert verdict.endswith(".")


@pytest.mark.slow
@settings(max_examples=25)
@given(*[st.integers(0, 40)] * 3, st.integers(1, 40))
def test_a_difference_is_claimed_only_where_the_test_shows_one(both: int, base: int, quant: int, neither: int) -> None:
    found = compare(*pair(both, base, quant, neither))
    claims = not found.verdict.startswith(("No difference shown", "Nothing to compare"))
    assert claims == (found.p_value < 0.05)
    if claims:
        assert ("fewer" in found.verdict) == (base > quant)


def test_the_flexible_score_can_be_compared_instead() -> None:
    base, quant = pair(3, 0, 0, 0)
    quant["outcomes"][0]["strict"] = False
    assert compare(base, quant).only_base == 1
    assert compare(base, quant, score="flexible").only_base == 0


def test_what_was_asked_differently_is_not_compared() -> None:
    base = result([True, False])
    for how, complaint in (
        ({"shots": 5}, "shots 8 and 5"),
        ({"max_tokens": 256}, "max_tokens 512 and 256"),
        ({"prompt_sha256": "c"}, "prompt_sha256 a and c"),
    ):
        with pytest.raises(UsageError, match=complaint):
            compare(base, result([True, False], **how))
    with pytest.raises(UsageError) as raised:
        compare(base, result([True, False], prompt_sha256="x\n" * 100_000))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    with pytest.raises(UsageError, match="questions 2 and 3"):
        compare(base, result([True, False, True]))
    assert compare(base, result([True, False], concurrency=1)).questions == 2


def test_other_questions_under_the_same_protocol_are_not_compared() -> None:
    base, quant = result([True, False]), result([True, False])
    quant["outcomes"][1]["question"] = "Another?"
    with pytest.raises(UsageError, match="the questions"):
        compare(base, quant)


# --- the files, and the command -----------------------------------------------------------------------------------


def garbled() -> list[Any]:
    good = result([True, False])
    outcome = good["outcomes"][0]
    return [
        [],
        {**good, "kind": "w8a8.kld"},
        {**good, "schema": 2},
        {**good, "model": None},
        {**good, "protocol": []},
        {**good, "outcomes": []},
        {**good, "outcomes": [1, 2]},
        {**good, "outcomes": [{**outcome, "strict": 1}, good["outcomes"][1]]},
        {**good, "outcomes": [outcome, outcome]},
        {**good, "strict": {"correct": 2}},
        {**good, "flexible": None},
    ]


@pytest.mark.parametrize("value", garbled())
def test_what_is_no_result_is_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InvalidResultError, match=r"x\.json"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no JSON", b"\xff\xfe\x00", b"[" * 99999])
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InvalidResultError, match=r"x\.json"):
        read(tmp_path / "x.json")
    with pytest.raises(InvalidResultError, match=r"y\.json"):
        read(tmp_path / "y.json")


def command(folder: Path, base: Any, quant: Any, *arguments: str) -> "subprocess.CompletedProcess[str]":
    for name, value in (("base", base), ("quant", quant)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    files = (str(folder / "base.json"), str(folder / "quant.json"))
    return cli("compare", *files, *arguments, env={"COLUMNS": "100"}, timeout=None)


def test_it_prints_the_counts_the_flips_and_the_verdict(tmp_path: Path) -> None:
    base, quant = pair(5, 2, 1, 4)
    base["outcomes"][5]["answer"] = "It is\x1b[2J six.\n#### 6"
    done = command(tmp_path, base, quant, "--flips", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (row,) = (line for line in lines if line.startswith("base right"))
    assert row.split() == ["base", "right", "5", "(41.7%)", "2", "(16.7%)", "7", "(58.3%)"]
    beside = [line for line in lines if "#### 6" in line]
    assert len(beside) == 1
    assert "#### 7" in beside[0]
    assert "\x1b" not in done.stdout
    assert done.stdout.count("question ") == 2
    assert "3 questions flipped; --flips 3 shows them all" in done.stdout
    assert "No difference shown" in done.stdout


def test_it_prints_json(tmp_path: Path) -> None:
    base, quant = pair(5, 2, 1, 4)
    done = command(tmp_path, base, quant, "--json")
    found = json.loads(done.stdout)
    assert (found["both_right"], found["only_base"], found["only_quant"], found["both_wrong"]) == (5, 2, 1, 4)
    assert found["verdict"] == compare(base, quant).verdict
    assert [flip["right"] for flip in found["flips"]] == ["base", "base", "quant"]


def test_failed_requests_are_mentioned(tmp_path: Path) -> None:
    base, quant = pair(5, 2, 1, 4)
    quant["outcomes"][5]["error"] = "no luck"
    assert "quantized: failed requests, which count as not right: 1" in command(tmp_path, base, quant).stdout
