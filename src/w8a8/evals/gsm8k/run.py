"""`w8a8 eval gsm8k`: how many of GSM8K's questions a model answers right, asked over an OpenAI-compatible API.

The questions are put as the protocol says (questions.py), many at a time (runner.py); each outcome goes to a journal
beside the result as it comes (journal.py), from which a run that was stopped goes on. The result depends on the
outcomes alone, sorted by question, so neither concurrency nor an interruption changes it. A failed request is no right
answer; it is counted, and asked again when the same command is given again.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from w8a8.errors import UsageError
from w8a8.evals.gsm8k.asking import Model, Reply, Server, ask_all, find_model
from w8a8.evals.gsm8k.journal import Journal, open_journal
from w8a8.evals.gsm8k.questions import ANSWER_FORMAT, DATASET, Data, Question, prompt_sha256, request
from w8a8.evals.gsm8k.scoring import flexible, strict
from w8a8.evals.statistics import wilson
from w8a8.evals.storing import store
from w8a8.version import __version__

KIND = "w8a8.gsm8k"
SCORES = ("strict", "flexible")


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the questions are asked; two results can be compared if all but `concurrency` is the same."""

    questions: int
    shots: int
    endpoint: str
    temperature: float
    max_tokens: int
    concurrency: int
    prompt_sha256: str
    """Of all that is sent but the question itself."""
    questions_sha256: str
    """Of the questions asked and their right answers."""
    dataset: str = DATASET
    split: str = "test"
    answer_format: str = ANSWER_FORMAT

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the outcomes depend on."""
        return {name: value for name, value in asdict(self).items() if name != "concurrency"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question and what the model said."""

    index: int
    question: Question
    reply: Reply

    @property
    def strict(self) -> bool:
        """Whether the number after the last `####` is right."""
        return not self.reply.error and strict(self.reply.text) == strict(self.question.solution)

    @property
    def flexible(self) -> bool:
        """Whether the last number is right."""
        return not self.reply.error and flexible(self.reply.text) == strict(self.question.solution)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the result."""
        return {
            **self.about,
            "index": self.index,
            "answer": self.reply.text,
            "finish_reason": self.reply.finish_reason,
            "error": self.reply.error,
        }

    @property
    def about(self) -> dict[str, Any]:
        """What the question makes of the reply."""
        return {
            "question": self.question.text,
            "gold": self.question.gold,
            "strict": self.strict,
            "flexible": self.flexible,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What an evaluation found; `to_dict` is the result file."""

    model: str
    base_url: str
    protocol: Protocol
    versions: Mapping[str, str]
    started: str
    seconds: float
    outcomes: Sequence[Outcome]
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        replies = [outcome.reply for outcome in self.outcomes]
        return {
            "kind": KIND,
            "schema": 1,
            "w8a8": __version__,
            "model": self.model,
            "base_url": self.base_url,
            "protocol": asdict(self.protocol),
            "versions": dict(self.versions),
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "tokens": {
                "prompt": sum(reply.prompt_tokens for reply in replies),
                "completion": sum(reply.completion_tokens for reply in replies),
            },
            "questions": len(self.outcomes),
            **{score: self._score(score) for score in SCORES},
            "cut_off": sum(reply.finish_reason == "length" for reply in replies),
            "empty": sum(not reply.error and not reply.text.strip() for reply in replies),
            "errors": sum(reply.error is not None for reply in replies),
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
        }

    def _score(self, score: str) -> dict[str, Any]:
        correct, asked = sum(getattr(outcome, score) for outcome in self.outcomes), len(self.outcomes)
        return {"correct": correct, "accuracy": correct / asked, "interval": wilson(correct, asked)}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: questions answered of all and right (strictly), tokens and seconds of this run alone."""

    done: int
    total: int
    right: int
    tokens: int
    seconds: float


def evaluate(
    server: Server,
    data: Data,
    *,
    model: str | None = None,
    completions: bool = False,
    temperature: float = 0,
    max_tokens: int = 512,
    concurrency: int = 16,
    out: Path | None = None,
    restart: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> Result:
    """Ask all questions in `data` (or those a stopped run left), score the answers, and write the result to `out`.

    `out` ends in .json (default: `results/gsm8k-MODEL.json`); the journal lies beside it and ends in .jsonl. Raises
    `ServerError`, `UsageError` and what `open_journal` raises.
    """
    found = find_model(server, model)
    out = out or Path("results") / f"gsm8k-{_file_name(found.name)}.json"
    if out.suffix != ".json" or out.is_dir():
        raise UsageError(f"--out {out}: a file whose name ends in .json")
    protocol = Protocol(
        questions=len(data.questions),
        shots=len(data.examples),
        endpoint="completions" if completions else "chat",
        temperature=temperature,
        max_tokens=max_tokens,
        concurrency=concurrency,
        prompt_sha256=prompt_sha256(data.examples, completions=completions),
        questions_sha256=data.sha256,
    )
    with open_journal(
        out.with_suffix(".jsonl"),
        asking={"model": found.name, **protocol.identity},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        questions=len(data.questions),
        restart=restart,
    ) as journal:
        _ask(server, found, data, protocol, journal, progress, notice)
        result = Result(
            model=found.name,
            base_url=_without_credentials(server.base_url),
            protocol=protocol,
            versions=_versions(found),
            started=journal.started,
            seconds=journal.seconds,
            outcomes=[Outcome(i, data.questions[i], reply) for i, reply in sorted(journal.replies.items())],
            path=out,
        )
        store(result.to_dict(), result.path)
    return result


def _ask(
    server: Server,
    model: Model,
    data: Data,
    protocol: Protocol,
    journal: Journal,
    progress: Callable[[Progress], None],
    notice: Callable[[str], None],
) -> None:
    """Ask what the journal has no answer to."""
    before, done = journal.seconds, len(journal.replies)
    right = sum(Outcome(i, data.questions[i], reply).strict for i, reply in journal.replies.items())
    tokens = 0
    if done:
        notice(f"{journal.path}: {done:,} of {len(data.questions):,} are answered already; --restart asks them again")

    def say(index: int, reply: Reply, seconds: float) -> None:
        nonlocal done, right, tokens
        outcome = Outcome(index, data.questions[index], reply)
        journal.seconds = before + seconds
        journal.append(index, reply, journal.seconds, outcome.about)
        done, right, tokens = done + 1, right + outcome.strict, tokens + reply.completion_tokens
        progress(Progress(done, len(data.questions), right, tokens, seconds))

    how = {"model": model.name, "temperature": protocol.temperature, "max_tokens": protocol.max_tokens}
    completions = protocol.endpoint == "completions"
    requests = {
        i: {**how, **request(question.text, data.examples, completions=completions)}
        for i, question in enumerate(data.questions)
        if i not in journal.replies
    }
    ask_all(server, requests, concurrency=protocol.concurrency, say=say)


def _versions(model: Model) -> dict[str, str]:
    return {
        "w8a8": __version__,
        "openai": version("openai"),
        "python": platform.python_version(),
        "server": model.owner,
    }


def _file_name(model: str) -> str:
    """The end of a model's name, fit to be part of a file's."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(model).name) or "model"


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
