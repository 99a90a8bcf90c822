"""Two results of `eval lm`, compared: which tasks, by which metric, in pairs, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.command import cli
from tests.publish.results import lm
from w8a8.errors import InvalidResultError, LimitError, UsageError
from w8a8.evals.limits import judge_tasks
from w8a8.evals.lm.compare import LmComparison, compare
from w8a8.evals.lm.results import Result, read

SCORES = [i % 3 > 0 for i in range(60)]
WORSE = [hit and i % 4 > 0 for i, hit in enumerate(SCORES)]


def result(folder: Path, name: str, value: Any) -> Result:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(value))
    return read(path)


def compared(folder: Path, base: Sequence[bool], quant: Sequence[bool], **how: Any) -> LmComparison:
    return compare(result(folder, "base", lm("base", base)), result(folder, "quant", lm("quant", quant)), **how)


def test_tasks_are_paired_document_by_document(tmp_path: Path) -> None:
    found = compared(tmp_path, SCORES, WORSE)
    arc, mmlu, prose = found.rows
    assert arc.paired is not None
    assert (arc.name, arc.metric, arc.paired.questions, arc.paired.only_base, arc.paired.only_quant) == (
        "arc_easy",
        "acc",
        60,
        10,
        0,
    )
    assert arc.paired.p_value < 0.01
    assert mmlu.paired is not None
    assert (mmlu.paired.questions, mmlu.paired.only_base) == (120, 20)  # both of its tasks
    assert (prose.metric, prose.paired) == ("bits_per_byte", None)
    assert found.verdict.startswith(
        "The quantized model answers fewer right in arc_easy, mmlu; by chance alone, 0.1 of 2"
    )
    assert found.to_dict()["rows"][0]["paired"]["both_wrong"] == 20
    with pytest.raises(UsageError, match="--metric acc_norm: no task has it; they have acc, bits_per_byte"):
        compared(tmp_path, SCORES, WORSE, metric="acc_norm")


def test_equal_results_show_no_difference_and_few_documents_hold_no_limit(tmp_path: Path) -> None:
    found = compared(tmp_path, SCORES, SCORES)
    assert found.verdict == "No difference shown in any of 2 tasks."
    paired = LmComparison(found.base, found.quant, found.rows[:2])
    assert judge_tasks(paired, 0.05).broken == ""
    limit = judge_tasks(paired, 0.01)
    assert limit.broken.startswith("arc_easy: --at-most-worse 1% is not held")
    assert limit.broken.endswith("(and 1 more of 2 tasks)")
    assert limit.bound == 3 / 60
    assert "by bits_per_byte documents are not right or wrong" in judge_tasks(found, 0.05).broken


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r["protocol"].update(limit=5), "limit None and 5"),
        (lambda r: r["tasks"][0].update(version="9"), "the version or the examples of arc_easy"),
        (lambda r: r["tasks"][0]["documents"].reverse(), "the documents of arc_easy, or their prompts"),
        (lambda r: r["rows"].pop(), "the tasks"),
    ],
)
def test_what_was_asked_differently_is_not_compared(change: Any, complaint: str, tmp_path: Path) -> None:
    value = lm("quant", SCORES)
    change(value)
    with pytest.raises(UsageError, match=complaint):
        compare(result(tmp_path, "base", lm("base", SCORES)), result(tmp_path, "quant", value))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(kind="w8a8.kld"),
        lambda r: r.update(schema=2),
        lambda r: r.update(rows=[]),
        lambda r: r["rows"][0].update(tasks=["nothing"]),
        lambda r: r["tasks"][0].update(documents=[]),
        lambda r: r["tasks"][0]["scores"]["acc"].pop(),
        lambda r: r["tasks"][0]["scores"].update(acc=["a"] * 60),
        lambda r: r["tasks"].append(r["tasks"][0]),
        lambda r: r["rows"][0]["metrics"][0].update(value="high"),
        lambda r: r.update(path="/etc/passwd"),
    ],
)
def test_what_is_no_result_is_refused(change: Any, tmp_path: Path) -> None:
    value = lm("model", SCORES)
    change(value)
    with pytest.raises(InvalidResultError, match=r"x\.json"):
        result(tmp_path, "x", value)


def test_the_command_takes_them(tmp_path: Path) -> None:
    for name, right in (("base", SCORES), ("quant", WORSE)):
        result(tmp_path, name, lm(name, right))
    files = (tmp_path / "base.json", tmp_path / "quant.json")
    done = cli("compare", *files, env={"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("mmlu"))
    assert "-16.7 (" in row
    assert row.endswith("20 of 120")
    gate = cli("compare", *files, "--at-most-worse", "1%", "--json")
    assert gate.returncode == LimitError.exit_code
    assert json.loads(gate.stdout)["limit"]["held"] is False
    mixed = cli("compare", files[0], __file__)
    assert mixed.returncode == InvalidResultError.exit_code
