"""Results of evaluations in the card."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

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
    assert "model-index" not in make(out, results=Results(lm_baseline=base)).text
    alone = make(out, results=Results(lm_quant=quant)).text
    assert r"| arc\_easy | acc | 5 | 60 | not measured | 0.6667 ± 0.0123 |  |" in alone


def test_the_hub_reads_the_checkpoints_scores_of_all_tasks(out: Path, files: Results, tmp_path: Path) -> None:
    right = [i % 3 > 0 for i in range(60)]
    told = lm("quant", right)
    strict = {"metric": "exact_match", "filter": "strict-match", "value": 0.5, "stderr": None, "higher_is_better": True}
    told["rows"][0]["metrics"].append(strict)
    told["protocol"]["chat"] = True
    path = write(tmp_path / "lm.json", told)
    text = make(out, results=Results(quant=files.quant, lm_quant=path)).text
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    name, found = model_index_to_eval_results(metadata(text)["model-index"])
    assert (name, data.eval_results) == ("llama-W8A8", found)
    assert [(each.dataset_type, each.metric_type, each.metric_value, each.metric_name) for each in found] == [
        ("openai/gsm8k", "exact_match", 65.0, "8-shot accuracy, strict, 60 questions"),
        ("arc_easy", "acc", 0.6667, "5-shot acc, chat, 60 documents"),
        ("arc_easy", "exact_match", 0.5, "5-shot exact_match,strict-match, chat, 60 documents"),
        ("mmlu", "acc", 0.6667, "5-shot acc, chat, 120 documents"),
        ("prose", "bits_per_byte", 0.75, "5-shot bits_per_byte, chat, 60 documents"),
    ]
    assert {each.task_type for each in found} == {"text-generation"}
    assert {each.source_name for each in found[1:]} == {"lm-evaluation-harness 0.4.13"}
    results = metadata(text)["model-index"][0]["results"]
    assert [len(result["metrics"]) for result in results] == [1, 2, 1, 1]  # a task's are together
