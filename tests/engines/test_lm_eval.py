"""lm-evaluation-harness, a client that is not ours, runs its GSM8K task against `w8a8 serve`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from tests.evals.api import write_data
from tests.servers import Server, served
from w8a8.evals.gsm8k.scoring import flexible, strict

TASK = "gsm8k_local"
QUESTIONS = 4
THEIRS = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"


@pytest.fixture(scope="module")
def server(gemma4_w8a8: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("lm_eval") / "log"
    with served(gemma4_w8a8, "transformers", log) as server:
        yield server


@pytest.mark.parametrize(
    ("client", "endpoint", "arguments"),
    [
        ("local-completions", "completions", ()),
        ("local-chat-completions", "chat/completions", ("--apply_chat_template", "--fewshot_as_multiturn", "True")),
    ],
)
def test_lm_eval_runs_gsm8k_against_it(
    client: str, endpoint: str, arguments: tuple[str, ...], server: Server, tmp_path: Path
) -> None:
    tasks, results = write_task(tmp_path / "tasks"), tmp_path / "results"
    how = f"model={server.model},base_url={server.url}/v1/{endpoint},num_concurrent=2,tokenizer_backend=None"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", client, "--model_args", how, "--tasks", TASK,
         "--include_path", str(tasks), "--num_fewshot", "2", "--limit", str(QUESTIONS),
         "--gen_kwargs", "max_gen_toks=24", "--log_samples", "--output_path", str(results), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OPENAI_API_KEY": "x"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = results.rglob("results_*.json")
    scores: Any = json.loads(found.read_text())["results"][TASK]
    (samples,) = results.rglob(f"samples_{TASK}_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for name, score in (("strict-match", strict), ("flexible-extract", flexible)):
        answers = [(line["resps"][0][0], line["doc"]["answer"]) for line in lines if line["filter"] == name]
        assert len(answers) == QUESTIONS
        assert all(answer for answer, _ in answers)
        assert scores[f"exact_match,{name}"] == sum(score(said) == strict(gold) for said, gold in answers) / QUESTIONS


def write_task(folder: Path) -> Path:
    """lm-eval's own task, on invented questions in local files."""
    data = write_data(folder / "data")
    files = {split: str(data / f"{split}.jsonl") for split in ("train", "test")}
    task = {
        "include": str(THEIRS),
        "task": TASK,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(task))
    return folder
