"""Results of evaluations in the card."""

import json
import re
from pathlib import Path

import pytest

from tests.command import cli
from tests.publish.card.reading import metadata, rows
from tests.publish.results import gsm8k, kld, lm, write
from w8a8.errors import InvalidResultError, UsageError
from w8a8.evals.statistics import wilson
from w8a8.publish.card.write import make
from w8a8.publish.results import Results

pytestmark = pytest.mark.slow


def test_without_results_it_says_not_measured(out: Path) -> None:
    text = make(out).text
    assert [row[2] for row in rows(text, "Accuracy")] == ["Accuracy", "not measured", "not measured"]
    assert "model-index" not in text
    assert "KL divergence" not in text


def test_results_stand_in_the_table_and_in_the_metadata(out: Path, files: Results) -> None:
    text = make(out, results=files).text
    table = rows(text, "Accuracy")
    for row, name, scheme, right in ((1, "llama", "original", 40), (2, "llama-W8A8", "INT8 W8A8", 39)):
        low, high = wilson(right, 60)
        assert table[row] == [name, scheme, f"{right / 60:.2%}", f"{low:.2%} to {high:.2%}", f"{right} / 60"]
    assert "60 questions, 8-shot, chat API, temperature 0" in text
    assert "No difference shown" in text
    assert "0.0286 nats (0.0271 to 0.0302)" in text
    [index] = metadata(text)["model-index"]
    [result] = index["results"]
    assert result["dataset"]["type"] == "openai/gsm8k"
    assert [metric["value"] for metric in result["metrics"]] == [65.0]


def test_a_divergence_computed_in_float32_says_so(out: Path, files: Results) -> None:
    assert files.kld
    assert "float32" not in make(out, results=files).text
    files.kld.write_text(json.dumps(kld() | {"dtypes": ["float32", "float32"]}))
    assert "of licence.txt, both computed in float32:" in make(out, results=files).text


def test_one_result_alone_leaves_the_other_not_measured(out: Path, files: Results) -> None:
    text = make(out, results=Results(baseline=files.baseline)).text
    assert [row[2] for row in rows(text, "Accuracy")[1:]] == ["66.67%", "not measured"]
    assert "model-index" not in text


def test_the_environment_names_the_results(out: Path, files: Results) -> None:
    env = {"EVAL_BASELINE_JSON": str(files.baseline), "EVAL_QUANT_JSON": str(files.quant), "HF_REPO_ID": "me/it"}
    run = cli("card", out, "--json", env=env)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["card"] == str(out / "README.md")
    text = (out / "README.md").read_text()
    assert [row[2] for row in rows(text, "Accuracy")[1:]] == ["66.67%", "65.00%"]
    assert "vllm serve me/it" in text


def test_figures_of_the_report_are_shown_once_they_lie_there(source: Path, out: Path, files: Results) -> None:
    assert "![" not in make(out).text
    run = cli("report", out, "--source", source, "--png", out / "figures", "--quant", str(files.quant))
    assert run.returncode == 0, run.stderr
    shown = re.findall(r"!\[[^]]+\]\((.+)\)", make(out).text)
    assert set(shown) == {str(path.relative_to(out)) for path in (out / "figures").iterdir()}
    assert {"figures/size.png", "figures/sqnr.png", "figures/gsm8k.png"} <= set(shown)


def test_what_is_no_result_is_refused(out: Path, files: Results) -> None:
    with pytest.raises(InvalidResultError, match=r"kld\.json"):
        make(out, results=Results(quant=files.kld))


def test_results_of_different_questions_are_not_compared(out: Path, files: Results) -> None:
    assert files.baseline
    files.baseline.write_text(json.dumps(gsm8k("base", [True] * 12)))
    with pytest.raises(UsageError, match="questions"):
        make(out, results=files)


def test_other_tasks_stand_in_a_table_of_their_own(out: Path, tmp_path: Path) -> None:
    right = [i % 3 > 0 for i in range(60)]
    base, quant = (write(tmp_path / f"{name}.json", lm(name, right)) for name in ("base", "quant"))
    text = make(out, results=Results(lm_baseline=base, lm_quant=quant)).text
    assert "Tasks of lm-evaluation-harness 0.4.13, as completions; values with their standard errors" in text
    table = [line for line in text.splitlines() if line.startswith((r"| arc\_easy", "| mmlu", "| prose"))]
    assert table[1] == ("| mmlu | acc | 5 | 120 | 0.6667 ± 0.0123 | 0.6667 ± 0.0123 | +0.0 (+0.0 to +0.0), p = 1.00 |")
    assert table[2] == r"| prose | bits\_per\_byte | 5 | 60 | 0.7500 | 0.7500 |  |"
    assert "No difference shown in any of 2 tasks." in text
    alone = make(out, results=Results(lm_quant=quant)).text
    assert r"| arc\_easy | acc | 5 | 60 | not measured | 0.6667 ± 0.0123 |  |" in alone
