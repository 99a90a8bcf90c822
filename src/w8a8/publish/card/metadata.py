"""The metadata of a card, which the Hub reads: the YAML block before its text."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from w8a8.publish.card.origin import Origin
from w8a8.publish.made import Made
from w8a8.publish.results import Gsm8k, Measured, Tasks
from w8a8.terminal.wording import plural

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

OURS = {"base_model", "base_model_relation", "tags", "library_name", "pipeline_tag", "model-index"}
"""Metadata that `w8a8 card` writes; any other that a person added stays."""


HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"


def describe_model(made: Made, origin: Origin, measured: Measured, name: str) -> dict[str, Any]:
    """Return the metadata of a checkpoint that the Hub will know as `name`, with its own scores of those `measured`."""
    from huggingface_hub import ModelCardData

    model_type = str(made.checkpoint.config.get("model_type", ""))
    tags = ["int8", "w8a8", "ptpc", "8-bit", made.scheme.method, "vllm", model_type]
    values: dict[str, Any] = {
        **({"base_model": origin.base, "base_model_relation": "quantized"} if origin.base else {}),
        **origin.license,
        "library_name": "vllm",
        "pipeline_tag": "image-text-to-text" if made.sees else "text-generation",
        "tags": [tag for tag in tags if tag],
    }
    scores = [_score(measured.quant)] if measured.quant else []
    scores += _task_scores(measured.tasks) if measured.tasks else ()
    if scores:
        values |= {"model_name": name, "eval_results": scores}
    return dict(ModelCardData(**values).to_dict())  # type: ignore[no-untyped-call]


def _score(result: Gsm8k) -> "EvalResult":
    """A GSM8K score for the Hub's model-index, in percent."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type="openai/gsm8k",
        dataset_name="GSM8K",
        dataset_config="main",
        dataset_split="test",
        metric_type="exact_match",
        metric_name=f"{result.asked.shots}-shot accuracy, strict, {plural(result.questions, 'question')}",
        metric_value=round(result.strict.value * 100, 2),
    )


def _task_scores(tasks: Tasks) -> "Iterator[EvalResult]":
    """Yield the quantized model's scores for the Hub's model-index, as lm-evaluation-harness gives them.

    A task stands for its data set: a group has several, and several tasks share one.
    """
    from huggingface_hub import EvalResult

    for row in tasks.rows:
        _, quant = row.values
        if quant:
            how = ["chat"] if tasks.chat else []
            yield EvalResult(
                task_type="text-generation",
                dataset_type=row.task,
                dataset_name=row.task,
                metric_type=quant.metric,
                metric_name=", ".join([f"{row.shots}-shot {row.metric}", *how, plural(row.documents, "document")]),
                metric_value=round(quant.value, 4),
                source_name=f"lm-evaluation-harness {tasks.harness}".strip(),
                source_url=HARNESS,
            )
