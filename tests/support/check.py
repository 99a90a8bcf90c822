"""One architecture from a tiny model to its row of the table, but for vLLM's part."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import w8a8
from tests.support import exact, tiny
from w8a8.checkpoint import TensorSpec
from w8a8.plan import Plan, Rules
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
ALL_EXPERTS = frozenset({"w1", "v1", "w2"})
"""Names of matrices that hold all experts of a layer, without a dimension for them (DBRX)."""
NOT_COUNTED = frozenset(
    {"embeddings", "lm_head", "norms", "scalars", "convolutions", "projector", "vision tower", "audio tower", "encoder"}
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
        kept: the share of those weights that the rules keep for a stated reason.
        because: the components that hold these, and the reasons.
        left: matrices that stay as they are without a stated reason, where these matter; `*` stands for numbers.
        warnings: what the plan warns of.
        verified: whether `verify` finds nothing wrong.
        runtime: relative RMS error of the logits in `w8a8.runtime` against the exact reference.
        failed: the first step that failed, and why.
        vllm: what vLLM makes of the result.
        source: what it makes of the source, where the result is not right in it.
        rounding: what INT8 changes then: the largest difference of a log-probability between what is expected of both.
        recipes: "yes" where recipes that calibrate take it, else why not; empty where that was not tried.
    """

    model_type: str
    name: str = ""
    share: float | None = None
    kept: float = 0.0
    because: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    verified: bool = False
    runtime: float | None = None
    failed: str | None = None
    vllm: Tried | None = None
    source: Tried | None = None
    rounding: float | None = None
    recipes: str = ""

    @property
    def possible(self) -> float:
        """INT8 weights per weight that is not kept for a stated reason; 0 where nothing is left, or nothing known."""
        return (self.share or 0.0) / max(1 - self.kept, 1e-9)


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
            _judge(row, plan, decoder_weights(model))
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
    return " ".join(error.replace(f"{folder}/", "").split())[:300]


@contextmanager
def _step(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except StepError as error:
        raise StepError(f"{name}: {reason(str(error), folder)}") from error
    except Exception as error:
        raise StepError(f"{name}: {reason(f'{type(error).__name__}: {error}', folder)}") from error


def decoder_weights(model: Any) -> int:
    """Number of weights of the text decoder's linear layers and experts, the output layer not among them."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    found = {}
    for path, module in (model.base_model if isinstance(decoder, nn.Linear) else decoder).named_modules():
        others = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding
        if module is head or path.endswith("lm_head") or "embed_tokens" in path or isinstance(module, others):
            continue
        for name, values in module.named_parameters(recurse=False):
            stack = values.ndim == 3 and name != "A_log"
            matrix = values.ndim == 2 and len(values) >= SMALL and name in {"weight", *ALL_EXPERTS}
            if stack or matrix:
                found[id(values)] = values.numel()
    return sum(found.values())


def _judge(row: Row, plan: Plan, weights: int) -> None:
    """Say in `row` how many of the decoder's `weights` are INT8, and what is not, and why."""
    rules = Rules.for_config(plan.config)
    reasons = {**rules.never, **rules.reasons}
    matrices = [d for d in plan.decisions if d.component not in NOT_COUNTED and _is_counted(d.tensor)]
    kept = [d for d in matrices if not d.quantize and d.component in reasons]
    row.share = sum(d.tensor.numel for d in matrices if d.quantize) / weights
    row.kept = sum(d.tensor.numel for d in kept) / weights
    row.because = {d.component: reasons[d.component] for d in kept}
    rest = [d.tensor.name for d in matrices if not d.quantize and d.component not in reasons]
    row.left = pattern(rest) if row.possible < 0.99 else ()


def _is_counted(tensor: TensorSpec) -> bool:
    """Whether a tensor is a weight, or holds experts, of `SMALL` outputs at least."""
    matrix = len(tensor.shape) == 2 and tensor.name.rpartition(".")[2] in {"weight", *ALL_EXPERTS}
    return (matrix or len(tensor.shape) == 3) and tensor.shape[-2] >= SMALL


def pattern(names: Sequence[str]) -> tuple[str, ...]:
    """The names with `*` for numbers, each once."""
    return tuple(sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}))


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
    if unused := sorted(name for storage in mode.unused if "vision" not in (name := mode.names[storage])):
        raise StepError(f"{len(unused)} INT8 weights are not used by the decoder, {unused[0]} for one")
    return got, wanted, source


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    """The model in `folder`, to compute in FP32."""
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    for what in ("missing_keys", "unexpected_keys"):
        if names := sorted(found[what]):
            raise StepError(f"{folder.name}: {len(names)} {what.replace('_', ' ')}, {names[0]} for one")
    return model.eval()
