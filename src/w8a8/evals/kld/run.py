"""`w8a8 eval kld`: how far a candidate's next-token distribution lies from the reference's on the same text.

Both checkpoints run side by side as the embedded engine runs them: in the dtypes they are stored in, as when served; or
in float32, so that the rounding of BF16 arithmetic (logits of 20 are 1/8 apart) does not hide that of quantization.
`prepare` checks the request before weights are read: the text, that both have one vocabulary and cut the text into the
same tokens, that they fit into memory. `run` measures.

The intervals are percentile bootstrap intervals over blocks. Neighbouring tokens share their context, so resampling
single tokens would make the intervals too narrow. A block is a run of at most 128 tokens of one window, and at most an
eighth of the text.
"""

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Checkpoint, resolve
from w8a8.cluster import connected
from w8a8.errors import DoesNotFitError, UnsupportedModelError, UnwritableError, UsageError
from w8a8.evals.kld.windows import MIN_CONTEXT, Window, cut, tokenize
from w8a8.evals.statistics import bootstrap
from w8a8.execute.workers import worker_count
from w8a8.machine import available_memory
from w8a8.memory import ram_needed
from w8a8.memory.ram import PROCESS_BYTES, held
from w8a8.sources.opening import as_run
from w8a8.sources.view import LogicalTensor, View
from w8a8.texts.files import Text, first_token
from w8a8.version import __version__

if TYPE_CHECKING:
    from w8a8.evals.kld.models import Dtype

BLOCK = 128
MIN_BLOCKS = 8
RESAMPLES = 2000
FIRST_EDGE, EDGES_PER_DECADE = -6, 4
"""Bins of the histogram: one below 1e-6 nats, then four per decade."""
FIRST_BAND = 16
"""Positions in the first band; each further band is as long as all before it."""
MAX_NLL = 709.0
"""The largest mean in nats whose exponential a float can hold."""

Floats = NDArray[np.float64]
Dtypes = tuple["Dtype | None", "Dtype | None"]


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: names of both checkpoints, and these as they will be read; the text, its windows.

    `streamed` runs both layer by layer; `dtypes` are those that they compute in, None for the stored one.
    """

    reference: str
    candidate: str
    views: tuple[View, View]
    text: Text
    text_tokens: int
    windows: tuple[Window, ...]
    context: int
    layers: int
    streamed: bool
    dtypes: Dtypes

    @property
    def tokens(self) -> int:
        """Number of tokens to predict."""
        return sum(window.scored for window in self.windows)

    @property
    def steps(self) -> int:
        """Units of progress: tokens compared, and, streamed, also each token that a layer of either model reads."""
        return self.tokens * (2 * self.layers + 1 if self.streamed else 1)


@dataclass(frozen=True, slots=True)
class Band:
    """Positions `first` to `last` of a window (at 0 one token has been read): tokens predicted there, their mean KL."""

    first: int
    last: int
    tokens: int
    mean_kl: float


@dataclass(frozen=True, slots=True)
class KldResult:
    """The result: KL divergence in nats per token, top-1 agreement as a share, 95% intervals, both perplexities."""

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
        """The content of the result file."""
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
    """Check the request before weights are read: to predict at most `tokens` tokens, in windows of at most `context`.

    `dtypes` are those that the reference and the candidate compute in, None for the stored one. Both are streamed layer
    by layer with `stream`, if there is no GPU and RAM cannot hold both, or if one has to be decoded: a GGUF file, or
    quantized in another way than W8A8.

    Raises UsageError, MissingExtraError, what opening a checkpoint raises, EngineError for a config or tokenizer that
    cannot be loaded, DoesNotFitError if not even two layers fit, and UnwritableError if `out` cannot be written.
    """
    from w8a8.evals.kld.models import CHUNK_BYTES, limits
    from w8a8.runtime.loading import load_tokenizer

    # 1) Check the options.
    if tokens < 1 or context < MIN_CONTEXT:
        raise UsageError(f"--tokens must be at least 1, and --context at least {MIN_CONTEXT}")
    if out is not None and not os.access(out.parent, os.W_OK):
        raise UnwritableError(f"{out}: {out.parent} is not a folder that can be written; give another --out")
    # 2) Check that the models have one vocabulary, and read windows of this length.
    names = str(reference), str(candidate)
    paths, opened = (resolve(reference).path, resolve(candidate).path), cache(Checkpoint.open)
    homes = [path if (path / "config.json").is_file() else opened(path).home for path in paths]  # GGUF's is made
    ours, theirs = map(limits, names, homes)
    if ours.vocabulary != theirs.vocabulary:
        raise UsageError(
            f"{names[0]} knows {ours.vocabulary:,} tokens, {names[1]} {theirs.vocabulary:,}: not a model and its "
            "quantized copy, so their predictions cannot be compared"
        )
    if context > (ours.context or context):
        raise UsageError(f"--context {context}: {names[0]} reads {ours.context} tokens at most")
    # 3) Check that both cut the text into the same tokens, and cut those into windows.
    tokenizers = [load_tokenizer(name, home) for name, home in zip(names, homes, strict=True)]
    (documents, first), other = [(tokenize(text, each), first_token(each)) for each in tokenizers]
    if (documents, first) != other:
        raise UsageError(
            f"{names[0]} and {names[1]} cut the text into different tokens: not a model and its quantized copy, so "
            "their predictions cannot be compared"
        )
    windows = tuple(cut(documents, first, context, tokens))
    # 4) Choose how they run: both whole at the same time, or layer by layer.
    views = as_run(opened(paths[0])), as_run(opened(paths[1]))
    streamed = stream or any(map(_is_decoded, views)) or not _fit_whole(views, dtypes, context)
    if streamed:
        needed = streamed_ram(views, dtypes, ours.vocabulary, max(ours.layers, 1), sum(w.scored for w in windows))
        _check_fits(needed + CHUNK_BYTES)
    return Job(*names, views, text, sum(map(len, documents)), windows, context, ours.layers, streamed, dtypes)


def _is_decoded(view: View) -> bool:
    """Whether its numbers are not those of its files, so that transformers cannot load it as it is."""
    return bool(view.quantized or view.checkpoint.gguf)


def _fit_whole(views: Sequence[View], dtypes: Dtypes, context: int) -> bool:
    """Can both models be in memory at the same time? On a GPU they can: what it cannot hold goes to RAM."""
    from w8a8.evals.kld.models import CHUNK_BYTES, has_gpu

    widened = sum(
        _held(tensor, dtype) - tensor.nbytes
        for view, dtype in zip(views, dtypes, strict=True)
        for tensor in view.tensors.values()
    )
    needed = sum(ram_needed(view.checkpoint, context) for view in views) + widened + CHUNK_BYTES
    return has_gpu() or needed <= available_memory()


def _check_fits(needed: int) -> None:
    """Raises DoesNotFitError if RAM, without a GPU, cannot hold what both models need layer by layer."""
    from w8a8.evals.kld.models import has_gpu

    free = available_memory()
    if needed > free and not has_gpu():
        raise DoesNotFitError(
            f"both models, layer by layer, need about {needed / 1e9:.1f} GB of RAM, {free / 1e9:.1f} GB are "
            "available; end other programs, or use a machine with more RAM or a GPU"
        )


def streamed_ram(views: Sequence[View], dtypes: Dtypes, vocabulary: int, layers: int, tokens: int) -> int:
    """Estimate the bytes of RAM that models of `layers` layers need to run layer by layer over `tokens` tokens.

    RAM holds both heads, the states of all tokens, and, twice, a layer of the larger model, decoded, counted as an
    equal share of all but its head: the smallest matrix with a row for each token of the `vocabulary`.
    """
    heads = states = layer = 0
    for view, dtype in zip(views, dtypes, strict=True):
        whole = sum(_held(tensor, dtype) for tensor in view.tensors.values())
        tables = [t for t in view.tensors.values() if len(t.shape) == 2 and t.shape[0] == vocabulary]
        head, width = min(((_held(table, dtype), table.shape[1]) for table in tables), default=(0, 0))
        heads += head
        states += tokens * width * 4
        layer = max(layer, (whole - head) // layers)
    return PROCESS_BYTES + heads + 2 * layer + states


def _held(tensor: LogicalTensor, dtype: "Dtype | None") -> int:
    """Bytes that a tensor takes in a model that computes in `dtype`."""
    return held(tensor, 4 if dtype == "float32" else 2)


def run(
    job: Job,
    *,
    ray: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> KldResult:
    """Load both models and measure; `advance(steps)` reports progress.

    At the address `ray`, the nodes of a cluster run the layers of models that are streamed. Raises EngineError,
    UnsupportedModelError, ClusterError, MissingExtraError, and UsageError where `ray` is given and nothing is streamed.
    """
    from w8a8.evals.kld.models import Predictor, StreamedPredictor, score
    from w8a8.runtime.nodes import on_nodes

    if ray and not job.streamed:
        raise UsageError("--ray runs the layers of models that are streamed: add --stream")

    start = time.monotonic()

    def load(name: str, view: View, dtype: "Dtype | None") -> Predictor:
        decoded = f", which is quantized already ({view.quantized})" if view.quantized else ""
        notice(f"{'reading layer by layer' if job.streamed else 'loading'} {name}{decoded}")
        if not job.streamed:
            return Predictor(name, view.path, dtype)
        try:
            hands = partial(on_nodes, cluster, notice=notice)
            return StreamedPredictor(name, view, job.windows, advance, dtype, lambda gpu: hands(gpu=gpu))
        except UnsupportedModelError as error:
            if not _is_decoded(view):
                raise
            raise UnsupportedModelError(
                f"{error}; `w8a8 convert {name} COPY --format bf16` makes a copy that need not be decoded"
            ) from error

    # 1) Load both models; streamed, their layers read all windows here.
    with connected(ray, f"kld {uuid4().hex}", here=worker_count()) if ray else nullcontext() as cluster:
        reference, candidate = map(load, (job.reference, job.candidate), job.views, job.dtypes)
    # 2) Let both predict every token, and compare.
    scores = score(reference, candidate, job.windows, advance=advance)
    # 3) Resample blocks of tokens: the intervals.
    agree = scores.agree.astype(np.float64)
    intervals = bootstrap(np.stack([scores.kl, agree]), block_starts(job.windows), resamples=RESAMPLES)
    # 4) Sum up.
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
    """The index, among all predicted tokens, at which each block begins; a block is resampled whole."""
    total = sum(window.scored for window in windows)
    length = min(BLOCK, math.ceil(total / MIN_BLOCKS))
    starts, at = [], 0
    for window in windows:
        starts.append(np.arange(at, at + window.scored, length))
        at += window.scored
    return np.concatenate(starts)


def bands(position: NDArray[np.int64], kl: Floats) -> tuple[Band, ...]:
    """The mean KL by position in the window: 0-15, 16-31, 32-63, 64-127 and so on."""
    found, first, length = [], 0, FIRST_BAND
    while first <= (end := int(position.max())):
        last = min(first + length - 1, end)
        inside = kl[(position >= first) & (position <= last)]
        found.append(Band(first, last, len(inside), float(inside.mean())))
        first = last + 1
        length = first
    return tuple(found)


def histogram(kl: Floats) -> tuple[tuple[float, float, int], ...]:
    """The bins `(from, to, count)` up to the largest value; a value on an edge counts in the bin above."""
    edges = [0.0, 10.0**FIRST_EDGE]
    while edges[-1] <= kl.max():
        edges.append(10.0 ** (FIRST_EDGE + (len(edges) - 1) / EDGES_PER_DECADE))
    counts, _ = np.histogram(kl, edges)
    return tuple(zip(edges[:-1], edges[1:], counts.tolist(), strict=True))


def _perplexity(nll: Floats) -> float:
    return math.exp(min(float(nll.mean()), MAX_NLL))
