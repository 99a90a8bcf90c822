"""`w8a8 eval lm`: tasks of lm-evaluation-harness, asked over an OpenAI-compatible API.

The harness makes the prompts and scores the answers; `model` asks the server, and `journal` keeps each answer at once.
The result has every metric as the harness computes it, and of each document what it scored, so that two models can be
compared document by document.
"""

import math
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from w8a8.errors import UsageError
from w8a8.evals.asking import Model, Server, find_model
from w8a8.evals.lm.journal import hashed, open_answers
from w8a8.evals.lm.results import Metric, Protocol, Result, Row, Task
from w8a8.evals.lm.tasks import Tasks
from w8a8.storage.writer import write_json
from w8a8.version import __version__

CONTEXT = 2048
"""Tokens where a server does not say its context, as in the harness."""
RANDOM_SEED, NUMPY_SEED = 0, 1234
"""The harness's own."""


def evaluate(
    server: Server,
    tasks: Tasks,
    *,
    asked: Sequence[str],
    model: str | None = None,
    tokenizer: Callable[[str], Any],
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    concurrency: int = 16,
    out: Path | None = None,
    restart: bool = False,
    progress: Any,
    notice: Callable[[str], None] = lambda _: None,
) -> Result:
    """Ask `tasks`, known as `asked`, the first `limit` documents of each, and write the result to `out`.

    `tokenizer` is given the model's name, and returns its tokenizer or None. `out` ends in .json (default:
    `results/lm-MODEL.json`); the journal beside it ends in .jsonl. Raises ServerError, UsageError, and what
    `open_answers` raises.
    """
    from lm_eval.evaluator import evaluate as harness

    from w8a8.evals.lm.model import ApiModel

    # 1) Find the model, and its tokenizer.
    found = find_model(server, model)
    out = out or Path("results") / f"lm-{found.file_name}.json"
    if out.suffix != ".json" or out.is_dir():
        raise UsageError(f"--out {out}: not the name of a file that ends in .json")
    words = tokenizer(found.name)
    if words is None and tasks.scored:
        raise UsageError(
            f"{tasks.scored[0]} scores texts token by token, which needs the model's tokenizer: give --tokenizer, a "
            "checkpoint's folder or Hub id"
        )
    if chat and words is not None and not words.chat_template:
        raise UsageError(f"{found.name}: the tokenizer has no chat template; leave out --chat")
    protocol = Protocol(tuple(asked), shots, limit, chat, words is not None, found.context or CONTEXT, concurrency)
    # 2) Open the journal, which may hold the answers of a run that was stopped.
    began = datetime.now(UTC).isoformat(timespec="seconds")
    with open_answers(
        out.with_suffix(".jsonl"), asking={"model": found.name, **protocol.identity}, started=began, restart=restart
    ) as answers:
        if answers.damage:
            notice(f"{answers.journal.path}: damaged ({answers.damage}); what it has no answer to is asked again")
        if answers.found:
            notice(f"{answers.journal.path}: {len(answers.found):,} answers are there; --restart asks them again")
        # 3) Let the harness ask.
        asking = ApiModel(
            server, found.name, words, answers, context=protocol.context, concurrency=concurrency, chat=chat,
            progress=progress,
        )  # fmt: skip
        random.seed(RANDOM_SEED)
        np.random.seed(NUMPY_SEED)
        made = harness(
            asking,
            {"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)},
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
        # 4) Write what it found.
        result = Result(
            model=found.name,
            base_url=server.about,
            protocol=protocol,
            versions=_versions(found),
            started=answers.started,
            seconds=answers.seconds,
            rows=tuple(Row(name, members, _metrics(made, name)) for name, members in tasks.rows.items()),
            tasks=tuple(_task(made, name) for name in tasks.tasks),
            path=out,
        )
        write_json(out, result.to_dict(), indent=1)
    return result


def _metrics(made: Mapping[str, Any], name: str) -> tuple[Metric, ...]:
    values, better = made["results"][name], made["higher_is_better"].get(name, {})
    return tuple(
        Metric(metric, how, number, _number(values.get(f"{metric}_stderr,{how}")), better.get(metric) is not False)
        for metric, _, how in (key.rpartition(",") for key in values if "_stderr," not in key)
        if metric and (number := _number(values[f"{metric},{how}"])) is not None
    )


def _task(made: Mapping[str, Any], name: str) -> Task:
    documents, scores = dict[int, str](), dict[str, dict[int, float]]()
    metrics = _metrics(made, name)
    for sample in made["samples"][name]:
        number = sample["doc_id"]
        documents[number] = hashed([sample[f"{part}_hash"] for part in ("doc", "prompt", "target")])[:16]
        for metric in metrics:
            if metric.filter == sample["filter"] and (value := _number(sample.get(metric.metric))) is not None:
                scores.setdefault(metric.name, {})[number] = value
    order = sorted(documents)
    return Task(
        name=name,
        version=str(made["versions"][name]),
        shots=int(made["n-shot"][name] or 0),
        of=int(made["n-samples"][name]["original"]),
        metrics=metrics,
        documents=tuple(documents[number] for number in order),
        scores={
            metric: tuple(found[number] for number in order)
            for metric, found in scores.items()
            if found.keys() == documents.keys()
        },
    )


def _number(value: Any) -> float | None:
    """A finite number as JSON spells it; None for all else, such as the harness's "N/A"."""
    if not isinstance(value, int | float | np.number | np.bool_) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(value)


def _versions(model: Model) -> dict[str, str]:
    packages = {name: version(name) for name in ("lm-eval", "datasets", "transformers")}
    return {"w8a8": __version__, **packages, "python": platform.python_version(), "server": model.owner}
