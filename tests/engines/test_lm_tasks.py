"""`eval lm` on stock vLLM finds what the harness finds with transformers: a model in FP32, whose sums are the same."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lm_eval.evaluator import evaluate as harness
from lm_eval.models.huggingface import HFLM

from tests.evals.lm.local import make_model, write_tasks
from tests.evals.lm.runs import run
from tests.servers import Server, served
from w8a8.evals import asking
from w8a8.evals.lm.tasks import load, tokenizer_of
from w8a8.runtime.loading import load_model

NAMES = ["pets", "last", "echoes", "prose"]


@pytest.fixture(scope="module")
def vllm(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lm-in-vllm")
    how = ("--dtype", "float32", "--", "--enforce-eager", "--max-num-seqs", "16")
    environment = vllm_python.parent.parent
    model = make_model(folder / "model")
    with served(model, "vllm", folder / "log", environment=environment, arguments=how) as server:
        yield server


def test_tasks_of_every_kind_are_scored_as_with_transformers(
    vllm: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    include, checkpoint = write_tasks(tmp_path / "tasks"), Path(vllm.model)
    server = asking.Server(f"{vllm.url}/v1", vllm.key)
    model, words = load_model("model", checkpoint), tokenizer_of(str(checkpoint))
    for chat in (False, True):
        names = NAMES[:3] if chat else NAMES
        made = run(server, names, include, tmp_path / f"{chat}.json", words=checkpoint, chat=chat)
        theirs = harness(
            HFLM(pretrained=model, tokenizer=words, max_length=256, batch_size=1, backend="causal"),
            {"tasks": dict(load(names, include=include).tasks), "groups": {}},
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
        for row in made.rows:
            expected = theirs["results"][row.name]
            values = [expected[f"{metric.metric},{metric.filter}"] for metric in row.metrics]
            assert [metric.value for metric in row.metrics] == pytest.approx(values, rel=1e-3), row.name
        # Not only who is right: the numbers and the texts themselves.
        lines = (tmp_path / f"{chat}.jsonl").read_text().splitlines()[1:]
        answers = [json.loads(line) for line in lines]
        scored = [answer["logprob"] for answer in answers if answer["logprob"]]
        said = {answer["text"] for answer in answers if not answer["logprob"]}
        for name in names[:2]:
            for nats in (float(resp[0][0]) for sample in theirs["samples"][name] for resp in sample["resps"]):
                assert min(abs(nats - found) for found in scored) < 1e-2
        assert said == {resp for sample in theirs["samples"]["echoes"] for resp in sample["resps"][0]}


def test_chats_go_to_it_as_they_are(vllm: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    server = asking.Server(f"{vllm.url}/v1", vllm.key)
    made = run(server, ["echoes"], write_tasks(tmp_path / "tasks"), tmp_path / "r.json", words=None, chat=True)
    assert (made.protocol.tokenized, len(made.tasks[0].documents), made.versions["server"]) == (False, 4, "vllm")
