"""`w8a8 eval kld`: how far a candidate's next-token distribution lies from the reference's on the same text.

Both checkpoints are run side by side as the embedded engine runs them, in the dtypes they are stored in, so that what
is measured is what is served; or in float32, so that what BF16 arithmetic rounds does not hide what quantization does:
logits of 20 are 1/8 apart in BF16. `prepare` checks what can be checked before weights are read: the text, that both
have one vocabulary and cut the text into the same tokens, that both fit into memory. `run` measures.

The intervals are percentile bootstrap intervals (Efron 1979), over blocks: tokens near each other share their context,
so that resampling single tokens would make the intervals too narrow. A block is a run of at most 128 tokens of
one window, and at most an eighth of the text.
"""

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Checkpoint, TensorSpec, resolve
from w8a8.errors import DoesNotFitError, UnwritableError, UsageError
from w8a8.evals.kld.windows import MIN_CONTEXT, Window, cut, tokenize
from w8a8.evals.statistics import bootstrap
from w8a8.machine import available_memory
from w8a8.memory import ram_needed
from w8a8.memory.ram import PROCESS_BYTES
from w8a8.texts.files import Text, first_token
from w8a8.version import __version__

if TYPE_CHECKING:
    from w8a8.evals.kld.models import Dtype

BLOCK = 128
MIN_BLOCKS = 8
RESAMPLES = 2000
FIRST_EDGE, EDGES_PER_DECADE = -6, 4
"""The histogram's bins: below 1e-6 nats, then four to a decade."""
FIRST_BAND = 16
"""Positions of the first band; every further one is as long as all before it."""
MAX_NLL = 709.0
"""Nats whose exponential a float still holds."""

Floats = NDArray[np.float64]
Dtypes = tuple["Dtype | None", "Dtype | None"]


@dataclass(frozen=True, slots=True)
class Job:
    """What is about to be measured: names and folders of both checkpoints, the text, its windows.

    `streamed` says that both are run layer by layer, `dtypes` what they compute in, None for as they are stored.
    """

    reference: str
    candidate: str
    folders: tuple[Path, Path]
    text: Text
    text_tokens: int
    windows: tuple[Window, ...]
    context: int
    layers: int
    streamed: bool
    dtypes: Dtypes

    @property
    def tokens(self) -> int:
        """How many tokens will be predicted."""
        return sum(window.scored for window in self.windows)

    @property
    def steps(self) -> int:
        """How many tokens are read, by whole models or, streamed, by layers; once more to compare."""
        return self.tokens * (2 * self.layers + 1 if self.streamed else 1)


@dataclass(frozen=True, slots=True)
class Band:
    """Positions `first` to `last` of a window (0 has read one token): tokens scored there and their mean KL."""

    first: int
    last: int
    tokens: int
    mean_kl: float


@dataclass(frozen=True, slots=True)
class KldResult:
    """KL divergences in nats per token, top-1 agreement as a share, 95% intervals, both perplexities."""

    reference: str
    candidate: str
    text: str
    text_sha256: str
    text_tokens: int
    tokens: int
    context: int
    dtypes: Dtypes
    mean: float
    median: float
    p99: float
    max: float
    mean_interval: tuple[float, float]
    agreement: float
    agreement_interval: tuple[float, float]
    reference_perplexity: float
    candidate_perplexity: float
    positions: tuple[Band, ...]
    histogram: tuple[tuple[float, float, int], ...]
    seconds: float
    device: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The result file's contents."""
        return {
            "kind": "w8a8.kld",
            "schema": 1,
            "w8a8": __version__,
            "reference": self.reference,
            "candidate": self.candidate,
            "text": {"name": self.text, "sha256": self.text_sha256, "tokens": self.text_tokens},
            "tokens": self.tokens,
            "context": self.context,
            "dtypes": list(self.dtypes),
            "kl": {
                "mean": self.mean,
                "median": self.median,
                "p99": self.p99,
                "max": self.max,
                "interval": list(self.mean_interval),
            },
            "top1": {"agreement": self.agreement, "interval": list(self.agreement_interval)},
            "perplexity": {"reference": self.reference_perplexity, "candidate": self.candidate_perplexity},
            "positions": [asdict(band) for band in self.positions],
            "histogram": [{"from": low, "to": high, "count": count} for low, high, count in self.histogram],
            "seconds": round(self.seconds, 3),
            "device": self.device,
            "versions": self.versions,
        }


def prepare(
    reference: str | Path,
    candidate: str | Path,
    text: Text,
    *,
    tokens: int = 8192,
    context: int = 512,
    out: Path | None = None,
    stream: bool = False,
    dtypes: Dtypes = (None, None),
) -> Job:
    """Check the request before weights are read; `tokens` at most are predicted, in windows of at most `context`.

    `dtypes` are what the reference and the candidate compute in, None for what they are stored in. They are streamed,
    layer by layer, if `stream` says so, or where both do not fit into RAM and there is no GPU.

    Raises UsageError, MissingExtraError, what opening a checkpoint raises, EngineError for a config or tokenizer that
    cannot be loaded, DoesNotFitError where not even that fits, and UnwritableError where `out` could not be written.
    """
    from w8a8.evals.kld.models import CHUNK_BYTES, has_gpu, limits
    from w8a8.runtime.loading import load_tokenizer

    if tokens < 1 or context < MIN_CONTEXT:
        raise UsageError(f"--tokens must be at least 1, and --context at least {MIN_CONTEXT}")
    if out is not None and not os.access(out.parent, os.W_OK):
        raise UnwritableError(f"{out}: {out.parent} is no folder that can be written")
    names = str(reference), str(candidate)
    folders = resolve(reference).path, resolve(candidate).path
    (vocabulary, limit, layers), (other, *_) = map(limits, names, folders)
    if vocabulary != other:
        raise UsageError(f"{names[0]} knows {vocabulary:,} tokens, {names[1]} {other:,}: not a model and its copy")
    if context > (limit or context):
        raise UsageError(f"--context {context}: {names[0]} reads {limit} tokens at most")
    tokenizers = [load_tokenizer(name, folder) for name, folder in zip(names, folders, strict=True)]
    (documents, first), ours = [(tokenize(text, each), first_token(each)) for each in tokenizers]
    if (documents, first) != ours:
        raise UsageError(f"{names[0]} and {names[1]} cut the text into different tokens: not a model and its copy")
    windows = cut(documents, first, context, tokens)
    opened = [Checkpoint.open(folder) for folder in folders]
    widened = sum(
        _in_memory(t, dtype) - t.nbytes
        for each, dtype in zip(opened, dtypes, strict=True)
        for t in each.tensors.values()
    )
    needed = sum(ram_needed(each, context) for each in opened) + widened + CHUNK_BYTES
    streamed = stream or (not has_gpu() and needed > available_memory())
    if streamed and not has_gpu():
        needed = CHUNK_BYTES + streamed_ram(opened, dtypes, max(layers, 1), sum(window.scored for window in windows))
        if needed > (free := available_memory()):
            raise DoesNotFitError(
                f"both models, layer by layer, need about {needed / 1e9:.1f} GB of RAM, {free / 1e9:.1f} GB are "
                "available; end other programs, or use a machine with more or a GPU"
            )
    return Job(*names, folders, text, sum(map(len, documents)), tuple(windows), context, layers, streamed, dtypes)


def streamed_ram(checkpoints: Sequence[Checkpoint], dtypes: Dtypes, layers: int, tokens: int) -> int:
    """Bytes of RAM to run models of `layers` layers one layer at a time over `tokens` tokens; an estimate.

    Kept are both heads, and the states of all tokens; a layer is the rest of the larger model's share, twice.
    """
    heads = states = layer = 0
    for checkpoint, dtype in zip(checkpoints, dtypes, strict=True):
        sizes = {name: _in_memory(tensor, dtype) for name, tensor in checkpoint.tensors.items()}
        head = max(sizes, key=lambda name: sizes[name])
        heads += sizes[head]
        states += tokens * checkpoint.tensors[head].shape[-1] * 4
        layer = max(layer, (sum(sizes.values()) - sizes[head]) // layers)
    return PROCESS_BYTES + heads + 2 * layer + states


def _in_memory(tensor: TensorSpec, dtype: "Dtype | None") -> int:
    """Bytes that a tensor takes where the model computes in `dtype`."""
    return tensor.numel * 4 if dtype == "float32" and tensor.dtype in {"BF16", "F16"} else tensor.nbytes


def run(
    job: Job,
    *,
    advance: Callable[[int], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> KldResult:
    """Load both and measure; `advance(steps)` is called as it goes. Raises EngineError, UnsupportedModelError."""
    from w8a8.evals.kld.models import Predictor, StreamedPredictor, score

    start = time.monotonic()
    loaded: list[Predictor] = []
    for name, folder, dtype in zip((job.reference, job.candidate), job.folders, job.dtypes, strict=True):
        notice(f"{'reading layer by layer' if job.streamed else 'loading'} {name}")
        streamed = job.streamed and StreamedPredictor(name, folder, job.windows, advance, dtype)
        loaded.append(streamed or Predictor(name, folder, dtype))
    reference, candidate = loaded
    scores = score(reference, candidate, job.windows, advance=advance)
    blocks = block_starts(job.windows)
    agree = scores.agree.astype(np.float64)
    intervals = bootstrap(np.stack([scores.kl, agree]), blocks, resamples=RESAMPLES)
    return KldResult(
        reference=job.reference,
        candidate=job.candidate,
        text=job.text.name,
        text_sha256=job.text.sha256,
        text_tokens=job.text_tokens,
        tokens=job.tokens,
        context=job.context,
        dtypes=job.dtypes,
        mean=float(scores.kl.mean()),
        median=float(np.median(scores.kl)),
        p99=float(np.quantile(scores.kl, 0.99)),
        max=float(scores.kl.max()),
        mean_interval=intervals[0],
        agreement=float(agree.mean()),
        agreement_interval=intervals[1],
        reference_perplexity=_perplexity(scores.reference_nll),
        candidate_perplexity=_perplexity(scores.candidate_nll),
        positions=bands(scores.position, scores.kl),
        histogram=histogram(scores.kl),
        seconds=time.monotonic() - start,
        device=str(reference.device),
        versions={"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}},
    )


def block_starts(windows: tuple[Window, ...]) -> NDArray[np.int64]:
    """Where, in the sequence of predicted tokens, each block begins: runs of one window that are resampled whole."""
    total = sum(window.scored for window in windows)
    length = min(BLOCK, math.ceil(total / MIN_BLOCKS))
    starts, at = [], 0
    for window in windows:
        starts.append(np.arange(at, at + window.scored, length))
        at += window.scored
    return np.concatenate(starts)


def bands(position: NDArray[np.int64], kl: Floats) -> tuple[Band, ...]:
    """Mean KL by how much of its window the model had read: positions 0-15, 16-31, 32-63, 64-127 and so on."""
    found, first, length = [], 0, FIRST_BAND
    while first <= (end := int(position.max())):
        last = min(first + length - 1, end)
        inside = kl[(position >= first) & (position <= last)]
        found.append(Band(first, last, len(inside), float(inside.mean())))
        first = last + 1
        length = first
    return tuple(found)


def histogram(kl: Floats) -> tuple[tuple[float, float, int], ...]:
    """Bins `(from, to, count)`, up to the one that holds the largest; a value on an edge counts above it."""
    edges = [0.0, 10.0**FIRST_EDGE]
    while edges[-1] <= kl.max():
        edges.append(10.0 ** (FIRST_EDGE + (len(edges) - 1) / EDGES_PER_DECADE))
    counts, _ = np.histogram(kl, edges)
    return tuple(zip(edges[:-1], edges[1:], counts.tolist(), strict=True))


def _perplexity(nll: Floats) -> float:
    return math.exp(min(float(nll.mean()), MAX_NLL))
