"""`w8a8 eval gsm8k`: how many of GSM8K's questions a model answers right, asked over an OpenAI-compatible API.

The prompts follow the protocol (questions.py), many requests run at a time (asking.py), and each outcome is added at
once to a journal beside the result (journal.py), from which a stopped run continues. The result depends on the outcomes
alone, sorted by question: neither concurrency nor an interruption changes it. A failed request counts as not right; the
same command, given again, asks it again.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from w8a8.errors import UsageError
from w8a8.evals.asking import Model, Reply, Server, ask_all, find_model
from w8a8.evals.gsm8k.journal import OutcomeJournal, open_journal
from w8a8.evals.gsm8k.questions import ANSWER_FORMAT, DATASET, Data, Question, prompt_sha256, request
from w8a8.evals.gsm8k.scoring import Marks, mark
from w8a8.evals.statistics import wilson
from w8a8.storage.writer import write_json
from w8a8.version import __version__

KIND = "w8a8.gsm8k"
SCORES = ("strict", "flexible")


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the questions are asked; results are comparable if all fields but `concurrency` are equal."""

    questions: int
    shots: int
    endpoint: str
    temperature: float
    max_tokens: int
    concurrency: int
    prompt_sha256: str
    """The hash of everything that is sent except the question."""
    questions_sha256: str
    """The hash of the questions and their right answers."""
    dataset: str = DATASET
    split: str = "test"
    answer_format: str = ANSWER_FORMAT

    @property
    def identity(self) -> Mapping[str, Any]:
        """The fields that outcomes depend on."""
        return {name: value for name, value in asdict(self).items() if name != "concurrency"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question and the model's reply; `noted` are the marks of one whose text was left out of the journal."""

    index: int
    question: Question
    reply: Reply
    noted: Marks | None = None

    @property
    def marks(self) -> Marks:
        """What is scored; a failed request is not right."""
        return Marks() if self.reply.error else self.noted or mark(self.reply.text, self.question.solution)

    def to_dict(self, *, texts: bool = True) -> dict[str, Any]:
        """The outcome as the result file holds it, with the `texts` of question and answer or without."""
        about = self.about
        return {
            **(about if texts else {name: value for name, value in about.items() if name != "question"}),
            "index": self.index,
            **({"answer": None if self.noted else self.reply.text} if texts else {}),
            "finish_reason": self.reply.finish_reason,
            "error": self.reply.error,
        }

    @property
    def about(self) -> dict[str, Any]:
        """The question, its right answer, and whether the reply is right."""
        return {
            "question": self.question.text,
            "gold": self.question.gold,
            "strict": self.marks.strict,
            "flexible": self.marks.flexible,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """The result of an evaluation; `to_dict` is the content of its file, with the `texts` of the answers or without."""

    model: str
    base_url: str
    protocol: Protocol
    versions: Mapping[str, str]
    started: str
    seconds: float
    outcomes: Sequence[Outcome]
    path: Path
    texts: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
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
            "empty": sum(outcome.marks.empty for outcome in self.outcomes),
            "errors": sum(reply.error is not None for reply in replies),
            "outcomes": [outcome.to_dict(texts=self.texts) for outcome in self.outcomes],
        }

    def _score(self, score: str) -> dict[str, Any]:
        correct, asked = sum(getattr(outcome.marks, score) for outcome in self.outcomes), len(self.outcomes)
        return {"correct": correct, "accuracy": correct / asked, "interval": wilson(correct, asked)}


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run: questions answered of all, those right (strict); tokens and seconds of this run alone."""

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
    texts: bool = True,
    progress: Callable[[Progress], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> Result:
    """Ask all questions in `data` (or those a stopped run left), score the answers, and write the result to `out`.

    `out` ends in .json (default: `results/gsm8k-MODEL.json`); the journal beside it ends in .jsonl. Without `texts`
    neither holds the text of a question or an answer. Raises ServerError, UsageError and what `open_journal` raises.
    """
    # 1) Find the model: a server that would refuse every request ends the run before anything is written.
    found = find_model(server, model)
    # 2) Fix where the result goes and how the questions are asked.
    out = out or Path("results") / f"gsm8k-{found.file_name}.json"
    if out.suffix != ".json" or out.is_dir():
        raise UsageError(f"--out {out}: not the name of a file that ends in .json")
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
    # 3) Open the journal, which may hold the answers of a run that was stopped.
    with open_journal(
        out.with_suffix(".jsonl"),
        asking={"model": found.name, **protocol.identity},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        questions=len(data.questions),
        restart=restart,
    ) as journal:
        # 4) Ask the questions it has no answer to.
        if journal.damage:
            notice(f"{journal.path}: damaged ({journal.damage}); what it has no answer to is asked again")
        if journal.replies:
            notice(
                f"{journal.path}: {len(journal.replies):,} of {len(data.questions):,} are answered already; "
                "--restart asks them again"
            )
        _ask(server, found, data, protocol, journal, texts, progress)
        # 5) Build the result from all outcomes, sorted by question, and write it.
        result = Result(
            model=found.name,
            base_url=server.about,
            protocol=protocol,
            versions=_versions(found),
            started=journal.started,
            seconds=journal.seconds,
            outcomes=_outcomes(data, journal),
            path=out,
            texts=texts,
        )
        write_json(result.path, result.to_dict(), indent=1 if texts else None)
    return result


def _outcomes(data: Data, journal: OutcomeJournal) -> list[Outcome]:
    """What the journal has, sorted by question."""
    replies = sorted(journal.replies.items())
    return [Outcome(i, data.questions[i], reply, journal.marks.get(i)) for i, reply in replies]


def _ask(
    server: Server,
    model: Model,
    data: Data,
    protocol: Protocol,
    journal: OutcomeJournal,
    texts: bool,
    progress: Callable[[Progress], None],
) -> None:
    """Ask the questions that the journal has no answer to, and record each outcome in it."""
    before, done, tokens = journal.seconds, len(journal.replies), 0
    right = sum(outcome.marks.strict for outcome in _outcomes(data, journal))

    def record(index: int, reply: Reply, seconds: float) -> None:
        nonlocal done, right, tokens
        outcome = Outcome(index, data.questions[index], reply)
        if texts:
            journal.record(index, reply, before + seconds, outcome.about)
        else:
            journal.record(index, reply, before + seconds, {}, outcome.marks)
        done, right, tokens = done + 1, right + outcome.marks.strict, tokens + reply.completion_tokens
        progress(Progress(done, len(data.questions), right, tokens, seconds))

    how = {"model": model.name, "temperature": protocol.temperature, "max_tokens": protocol.max_tokens}
    completions = protocol.endpoint == "completions"
    requests = {
        i: {**how, **request(question.text, data.examples, completions=completions)}
        for i, question in enumerate(data.questions)
        if i not in journal.replies
    }
    ask_all(server, requests, concurrency=protocol.concurrency, answered=record)


def _versions(model: Model) -> dict[str, str]:
    return {
        "w8a8": __version__,
        "openai": version("openai"),
        "python": platform.python_version(),
        "server": model.owner,
    }
