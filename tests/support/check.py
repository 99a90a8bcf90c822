"""One architecture from a tiny model to its row of the table, but for vLLM's part."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import w8a8
from tests.support import exact, tiny
from w8a8.plan import Plan
from w8a8.quantization import Options

PROMPTS = (
    (7, 11, 3, 201, 94, 35, 8, 150, 77, 12, 260, 31, 5, 180, 66, 23),
    (90, 14, 222, 6, 41, 113, 270, 9, 33, 58, 147, 19, 205, 71, 16, 4),
    (55, 240, 18, 129, 3, 62, 199, 84, 10, 27, 163, 251, 44, 13, 98, 36),
)
"""What every model reads. The middle one of the prompts' errors counts: where a value lies within FP32's rounding of
the middle between two codes, either is right, and one code apart is seen in all that follows."""
SMALL = 16
"""Linear layers of fewer outputs (routers, gates that give a number per head) do not count as weights to quantize."""
NOT_COUNTED = frozenset(
    {"embeddings", "lm_head", "norms", "router", "projector", "vision tower", "audio tower", "encoder"}
)
"""Components of which the decoder's linear layers are none."""


Scores = Sequence[Sequence[float]]
"""A log-probability for every token but the first of every prompt."""


@dataclass(frozen=True)
class Expected:
    """What a model should give: the `result` by the exact reference, the `source` by transformers in FP32."""

    result: Scores
    source: Scores


@dataclass(frozen=True)
class Tried:
    """What vLLM makes of a checkpoint.

    Attributes:
        difference: largest difference of a log-probability from what is expected, nats.
        dtype: what vLLM computed in.
        failed: why it gave none.
        known: whether vLLM has such a model at all.
    """

    difference: float | None
    dtype: str = "float32"
    failed: str | None = None
    known: bool = True


@dataclass
class Row:
    """What was found of an architecture.

    Attributes:
        model_type: its `model_type`.
        name: the class of transformers.
        share: INT8 weights per weight of the text decoder's linear layers and experts.
        left: matrices of a decoder with less than its all in INT8 that stay as they are; `*` stands for numbers.
        warnings: what the plan warns of.
        verified: whether `verify` finds nothing wrong.
        runtime: relative RMS error of the logits in `w8a8.runtime` against the exact reference.
        failed: the first step that failed, and why.
        vllm: what vLLM makes of the result.
        source: what it makes of the source, where the result is not right in it.
    """

    model_type: str
    name: str = ""
    share: float | None = None
    left: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    verified: bool = False
    runtime: float | None = None
    failed: str | None = None
    vllm: Tried | None = None
    source: Tried | None = None


class StepError(Exception):
    """A step that failed, and why."""


def check(
    model_type: str,
    folder: Path,
    format: str | None = None,  # noqa: A002
) -> tuple[Row, Expected | None]:
    """Try an architecture in `folder`: make `source`, quantize it into `result`, verify and run that.

    Returns its row, and the log-probabilities that both should give; none where that was not reached.
    """
    row = Row(model_type)
    try:
        with _step("make", folder):
            model = tiny.make_model(model_type)
            row.name = type(model).__name__
            model.save_pretrained(folder / "source")
        with _step("plan", folder):
            plan = w8a8.dry_run(folder / "source", Options(format=format))
            row.share = sum(d.tensor.numel for d in plan.decisions if d.quantize) / decoder_weights(model)
            row.left = left_alone(plan) if row.share < 0.99 else ()
            row.warnings = plan.warnings
        with _step("quantize", folder):
            w8a8.quantize(folder / "source", folder / "result", Options(format=format))
        with _step("verify", folder):
            if problems := w8a8.verify(folder / "result", folder / "source").problems:
                raise StepError(problems[0])
            row.verified = True
        with _step("run", folder):
            ours, reference, source = logits(type(model), folder)
            errors = (ours - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
            row.runtime = float(errors.median())
            return row, Expected(_scores(reference), _scores(source))
    except StepError as error:
        row.failed = str(error)
    return row, None


def reason(error: str, folder: Path) -> str:
    """An error as one short line that is the same whichever folder a model lay in."""
    return " ".join(error.replace(f"{folder}/", "").split())[:200]


@contextmanager
def _step(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except StepError as error:
        raise StepError(f"{name}: {reason(str(error), folder)}") from error
    except Exception as error:
        raise StepError(f"{name}: {reason(f'{type(error).__name__}: {error}', folder)}") from error


def decoder_weights(model: Any) -> int:
    """Number of weights of the text decoder's linear layers and experts."""
    found = {}
    for path, module in model.get_decoder().named_modules():
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding) and "embed" not in path:
            for name, values in module.named_parameters(recurse=False):
                if values.ndim == 3 or (values.ndim == 2 and name == "weight" and len(values) >= SMALL):
                    found[id(values)] = values.numel()
    return sum(found.values())


def left_alone(plan: Plan) -> tuple[str, ...]:
    """The decoder's matrices and stacks that are not quantized; `*` stands for numbers."""
    matrices = [
        d.tensor.name
        for d in plan.decisions
        if not d.quantize and d.component not in NOT_COUNTED and len(d.tensor.shape) > 1 and d.tensor.shape[0] >= SMALL
    ]
    return tuple(sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in matrices}))


def _scores(logits: Tensor) -> Scores:
    """The log-probability of every token of `PROMPTS` but the first of each; `logits` as they come from a model."""
    following = torch.tensor(PROMPTS)[:, 1:, None]
    found: list[list[float]] = logits.log_softmax(-1)[:, :-1].gather(-1, following).squeeze(-1).tolist()
    return found


def logits(kind: Any, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of the result in `w8a8.runtime`, of the exact reference, and of the source.

    All are float32 [prompts, tokens, vocabulary].
    """
    ours = _loaded(kind, folder / "result")
    reference = _loaded(kind, folder / "source", experts_implementation="eager")
    ids = torch.tensor(PROMPTS)
    with torch.inference_mode():
        got = ours(input_ids=ids, use_cache=False).logits.float()
        source = reference(input_ids=ids, use_cache=False).logits.float()
        with exact.InInt8(exact.int8_weights(reference, ours)) as mode:
            wanted = reference(input_ids=ids, use_cache=False).logits.float()
    if unused := sorted(mode.names[storage] for storage in mode.unused):
        raise StepError(f"{len(unused)} INT8 weights are not used by the decoder, {unused[0]} for one")
    return got, wanted, source


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    """The model in `folder`, to compute in FP32."""
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    for what in ("missing_keys", "unexpected_keys"):
        if names := sorted(found[what]):
            raise StepError(f"{folder.name}: {len(names)} {what.replace('_', ' ')}, {names[0]} for one")
    return model.eval()
