"""`eval lm` against the harness's own model of transformers, and what happens when it is interrupted or refused."""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import evaluate as harness
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from tests.evals.lm.runs import run, silent
from tests.servers import listening
from w8a8.errors import HubError, InvalidResultError, ServerError, UsageError
from w8a8.evals.asking import Server
from w8a8.evals.lm import tasks
from w8a8.evals.lm.results import read
from w8a8.evals.lm.tasks import load, tokenizer_of
from w8a8.runtime.loading import load_model

pytestmark = pytest.mark.slow

ALL = ["pets", "echoes", "last", "prose"]


@pytest.mark.parametrize(("chat", "shots"), [(False, 1), (True, 0)])
def test_it_finds_what_the_harness_finds_with_transformers(
    chat: bool, shots: int, server: Server, checkpoint: Path, include: Path, tmp_path: Path
) -> None:
    names = ALL[:3] if chat else ALL
    made = run(server, names, include, tmp_path / "r.json", words=checkpoint, shots=shots, chat=chat)
    model, words = load_model("model", checkpoint), tokenizer_of(str(checkpoint))
    theirs = harness(
        HFLM(pretrained=model, tokenizer=words, max_length=256, batch_size=1, backend="causal"),
        {"tasks": dict(load(names, include=include, shots=shots).tasks), "groups": {}},
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    assert [row.name for row in made.rows] == names
    for row, task in zip(made.rows, made.tasks, strict=True):
        expected = theirs["results"][row.name]
        assert row.metrics == task.metrics
        for metric in row.metrics:
            assert metric.value == pytest.approx(expected[f"{metric.metric},{metric.filter}"], rel=1e-4), row.name
            error = expected[f"{metric.metric}_stderr,{metric.filter}"]
            assert metric.stderr == (None if error == "N/A" else pytest.approx(error, rel=1e-3))
        assert (task.version, task.shots, task.of, len(task.documents)) == ("1.5", shots, 4, 4)
        for sample in theirs["samples"][row.name]:
            for metric in sample["metrics"]:
                if metric in task.scores:
                    assert task.scores[metric][sample["doc_id"]] == sample[metric]
    # Not only who is right: the numbers and the texts themselves.
    answers = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()][1:]
    scored = sorted(answer["logprob"] for answer in answers if answer["logprob"])
    expected = [
        float(resp[0][0]) for name in ("pets", "last") for sample in theirs["samples"][name] for resp in sample["resps"]
    ]
    for nats in expected:
        assert min(abs(nats - found) for found in scored) < 1e-3
    said = {answer["text"] for answer in answers if not answer["logprob"]}
    assert said == {resp for sample in theirs["samples"]["echoes"] for resp in sample["resps"][0]}
    assert json.loads(json.dumps(read(tmp_path / "r.json").to_dict())) == json.loads((tmp_path / "r.json").read_text())


def test_the_harness_own_client_is_given_the_same(
    server: Server, checkpoint: Path, include: Path, tmp_path: Path
) -> None:
    made = run(server, ["pets"], include, tmp_path / "r.json", words=checkpoint)
    client = LocalCompletionsAPI(
        base_url=f"{server.base_url}/completions",
        model=made.model,
        tokenizer=str(checkpoint),
        tokenizer_backend="huggingface",
        add_bos_token=True,
        max_length=256,
        header={"Authorization": f"Bearer {server.api_key}"},
    )
    theirs = harness(client, {"tasks": dict(load(["pets"], include=include).tasks), "groups": {}})
    found = sorted(float(resp[0][0]) for sample in theirs["samples"]["pets"] for resp in sample["resps"])
    lines = (tmp_path / "r.jsonl").read_text().splitlines()[1:]
    assert found == pytest.approx(sorted(json.loads(line)["logprob"] for line in lines), abs=1e-5)


def test_a_group_is_a_row_and_its_tasks_are_paired(
    server: Server, checkpoint: Path, include: Path, tmp_path: Path
) -> None:
    made = run(server, ["zoo", "last"], include, tmp_path / "r.json", words=checkpoint, limit=3)
    zoo, last = made.rows
    assert (zoo.name, zoo.tasks, last.tasks) == ("zoo", ("pets", "more_pets"), ("last",))
    scores = [score for task in made.of(zoo) for score in task.scores["acc"]]
    assert len(scores) == 6
    assert [metric.name for metric in zoo.metrics] == ["acc"]
    assert zoo.metrics[0].value == pytest.approx(sum(scores) / 6)
    assert made.protocol.limit == 3
    assert made.versions["lm-eval"].startswith("0.4.")


def test_an_interrupted_run_asks_only_what_is_left(
    server: Server, checkpoint: Path, include: Path, tmp_path: Path
) -> None:
    asked: list[list[Any]] = []

    @contextmanager
    def counted(what: str, total: int) -> Iterator[Callable[[int], None]]:
        asked.append([what, total, 0])

        def advance(more: int) -> None:
            asked[-1][2] += more

        yield advance

    out = tmp_path / "r.json"
    whole = run(server, ["pets", "echoes"], include, out, words=checkpoint, progress=counted)
    assert asked == [["log-likelihoods", 12, 12], ["answers", 4, 4]]
    lines = out.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    out.with_suffix(".jsonl").write_text("".join(lines[:6]) + lines[6][:9])  # killed while it wrote a line
    again = run(server, ["pets", "echoes"], include, out, words=checkpoint)
    assert again.tasks == whole.tasks
    assert [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()][:6] == [
        json.loads(line) for line in lines[:6]
    ]
    with pytest.raises(UsageError, match="limit was None, not 2"):
        run(server, ["pets", "echoes"], include, out, words=checkpoint, limit=2)
    assert len(run(server, ["pets"], include, out, words=checkpoint, limit=2, restart=True).tasks[0].documents) == 2


def test_answers_without_a_tokenizer_go_as_texts_and_chats(server: Server, include: Path, tmp_path: Path) -> None:
    for chat in (False, True):
        made = run(server, ["echoes"], include, tmp_path / f"{chat}.json", words=None, chat=chat)
        assert (made.protocol.tokenized, made.protocol.chat, len(made.tasks[0].documents)) == (False, chat, 4)
    with pytest.raises(UsageError, match=r"pets scores texts token by token.*--tokenizer"):
        run(server, ["pets"], include, tmp_path / "r.json", words=None)


class Plain(BaseHTTPRequestHandler):
    """A server without log-probabilities."""

    protocol_version = "HTTP/1.1"
    status, said = 200, '{"choices": [{"index": 0, "text": "so", "logprobs": null, "finish_reason": "length"}]}'

    def do_GET(self) -> None:
        self._send(200, '{"data": [{"id": "plain", "object": "model"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(self.status, self.said)

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class Refusing(Plain):
    status, said = 400, '{"error": {"message": "echo is not supported"}}'


@pytest.mark.parametrize(
    ("handler", "complaint"),
    [(Plain, "the answer has no log-probabilities of the prompt"), (Refusing, "echo is not supported")],
)
def test_a_server_that_scores_nothing_is_refused(
    handler: type[Plain], complaint: str, checkpoint: Path, include: Path, tmp_path: Path
) -> None:
    with listening(handler) as url, pytest.raises(ServerError, match=f"{complaint}.*w8a8 serve"):
        run(Server(f"{url}/v1", "none"), ["pets"], include, tmp_path / "r.json", words=checkpoint)
    assert not (tmp_path / "r.json").exists()


def test_what_cannot_be_asked_is_said_before_a_server_is(include: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the harness's own 14,000 files, which take a quarter of a minute.
    manager = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: manager(include_path=include_path))
    with pytest.raises(UsageError, match="petz: the harness has no such task; did you mean pets"):
        load(["pets", "petz"], include=include)
    with pytest.raises(UsageError, match="not a folder"):
        load(["pets"], include=include / "nowhere")
    with pytest.raises(UsageError, match="programs that the model writes"):
        load(["programs"], include=include)
    with pytest.raises(UsageError, match="pets is asked for twice"):
        load(["zoo", "pets"], include=include)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"far: its data cannot be had.*--include-path"):
        load(["far"], include=include)


def test_the_journal_of_another_command_is_kept(
    server: Server, checkpoint: Path, include: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.jsonl").write_text('{"kind": "w8a8.gsm8k.journal", "schema": 1, "started": "", "asking": {}}\n')
    with pytest.raises(InvalidResultError, match="not a journal of `w8a8 eval lm`"):
        run(server, ["last"], include, tmp_path / "r.json", words=checkpoint, progress=silent)
