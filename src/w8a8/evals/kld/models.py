"""The two models of `w8a8 eval kld`, and how far their next-token distributions lie apart.

The logits are the model's own, as it is served (`runtime.sliced`), and at most `CHUNK_VALUES` of them exist at once.

With logits p and q, KL is the mean of p - q weighted by exp(p - max p), minus the difference of their log-sum-exps.
Elements are computed in float32, which is exact for the difference of BF16 logits; sums continue in float64, because a
log-sum-exp in float32 is off by 1e-6 at logits of 20, as much as near models differ.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from w8a8.errors import EngineError, MissingExtraError, first_line
from w8a8.evals.kld.windows import Window
from w8a8.sources.view import View

try:
    import torch

    from w8a8.runtime.calls import Call, States
    from w8a8.runtime.loading import engine_errors, load_config, load_model
    from w8a8.runtime.samples import HERE, Hands
    from w8a8.runtime.sliced import sliced_logits
    from w8a8.runtime.streamed import StreamedModel, body_of, forward_block
except ImportError as missing:
    raise MissingExtraError(f"eval kld needs torch and transformers ({missing}): pip install 'w8a8[eval]'") from missing

Dtype = Literal["float32", "bfloat16"]
"""The dtypes that a model can be made to compute in, whatever it is stored in."""
CHUNK_VALUES = 2**24
"""Logits of one model that exist at once: 64 positions of a vocabulary of 262,144."""
CHUNK_BYTES = CHUNK_VALUES * 24
"""Memory of a chunk: both models' logits, and up to four arrays in float32."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One value per predicted token, in order, `[tokens]`: its position in its window; KL(ref || cand) and both models'
    negative log-likelihoods of the true token, in nats (float64); whether both models find the same token likeliest.
    """

    position: NDArray[np.int64]
    kl: NDArray[np.float64]
    reference_nll: NDArray[np.float64]
    candidate_nll: NDArray[np.float64]
    agree: NDArray[np.bool_]


class Predictor:
    """A checkpoint as a model of the next token."""

    def __init__(self, name: str, folder: Path, dtype: Dtype | None = None) -> None:
        """Load it onto the GPU, or into RAM, to compute in `dtype` (None: the stored one).

        Raises EngineError, or the error of an invalid checkpoint.
        """
        self.name = name
        self.model = load_model(name, folder, dtype or "auto")
        if self.model.get_output_embeddings() is None or body_of(self.model) is self.model:
            kind = type(self.model).__name__
            raise EngineError(f"{name}: {kind} predicts no tokens; a model that generates text is needed")
        self.device = self.model.device

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def logits(self, ids: Sequence[int], rows: int) -> Iterator[Any]:
        """Yield the logits `[at most rows, vocabulary]` that follow each of `ids`, in order, in the model's dtype.

        Exhaust one such iterator before the next: until then the body's `forward` is replaced. Raises EngineError, also
        when out of memory.
        """
        inputs = torch.tensor([ids], device=self.device)
        try:
            yield from sliced_logits(self.model, rows, input_ids=inputs, use_cache=False)
        except (RuntimeError, IndexError, MemoryError) as error:
            raise EngineError(f"{self.name}: {first_line(error)}") from error


class StreamedPredictor(Predictor):
    """A checkpoint too large for memory: each layer in turn reads all windows, and the head comes last."""

    def __init__(
        self,
        name: str,
        seen: View,
        windows: Sequence[Window],
        advance: Callable[[int], None] = lambda _: None,
        dtype: Dtype | None = None,
        hands: Callable[[bool], AbstractContextManager[Hands]] = lambda _: nullcontext(HERE),
    ) -> None:
        """Let each layer read all windows, in `dtype` (None: the stored one); `advance(tokens)` reports progress.

        `hands(gpu)` run the layers, on a GPU if so.

        Raises EngineError, UnsupportedModelError.
        """
        self.name = name
        self._streamed = StreamedModel(name, seen, getattr(torch, dtype) if dtype else None)
        self.model, self.device = self._streamed.model, self._streamed.device
        with hands(self.device.type == "cuda") as running:
            self._states = self._read({window.ids[:-1]: None for window in windows}, advance, running)
        self._streamed.fill_head()

    def logits(self, ids: Sequence[int], rows: int) -> Iterator[Any]:
        """Yield the logits as a `Predictor` does, for one of the windows that were read."""
        self._streamed.last_states(self._states[tuple(ids)])
        found: Iterator[Any] = super().logits(ids, rows)
        return found

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _read(
        self, readings: Iterable[tuple[int, ...]], advance: Callable[[int], None], hands: Hands
    ) -> dict[tuple[int, ...], Any]:
        """The states `[1, tokens, hidden]` behind the last layer, by the ids that were read."""
        states: dict[tuple[int, ...], States] = {}
        common: dict[int, Any] = {}  # the arguments of layers that depend on the length alone
        apart: dict[tuple[int, ...], Any] = {}
        for ids in readings:
            hidden, kwargs = self._streamed.embed(ids)
            states[ids], shared = States(hidden), common.setdefault(len(ids), kwargs)
            apart[ids] = self._streamed.own(kwargs, shared)
        for number in range(self._streamed.count):
            calls = (Call(each, {**common[len(ids)][number], **apart[ids][number]}) for ids, each in states.items())
            with self._streamed.layer(number) as layer, hands.placed(layer, calls) as placed:
                for ids, made in zip(states, chain.from_iterable(placed.each(forward_block)), strict=True):
                    states[ids] = made
                    advance(len(ids))
        return {ids: each.hidden for ids, each in states.items()}


@dataclass(frozen=True, slots=True)
class Limits:
    """A model's size: tokens it knows, tokens it can read (None if its config does not say), decoder layers."""

    vocabulary: int
    context: int | None
    layers: int


def limits(name: str, folder: Path) -> Limits:
    """Read the limits of a checkpoint's model from its config. Raises EngineError."""
    with engine_errors(f"{name}: its config cannot be read"):
        config = load_config(name, folder).get_text_config(decoder=True)
        context = getattr(config, "max_position_embeddings", None)
        return Limits(int(config.vocab_size), context, int(config.num_hidden_layers))


def has_gpu() -> bool:
    """Is there a GPU, where the models will go?"""
    return bool(torch.cuda.is_available())


def score(
    reference: Predictor,
    candidate: Predictor,
    windows: Sequence[Window],
    *,
    advance: Callable[[int], None] = lambda _: None,
    chunk_values: int = CHUNK_VALUES,
) -> Scores:
    """Let both models predict the windows' tokens; `advance(tokens)` reports progress.

    Raises EngineError, naming model and place, if logits are not finite, or rule out a token that the other model or
    the text has.
    """
    rows = max(1, chunk_values // reference.model.config.get_text_config(decoder=True).vocab_size)
    parts = []
    for number, window in enumerate(windows):
        ids = window.ids[:-1]
        for i, pair in enumerate(zip(reference.logits(ids, rows), candidate.logits(ids, rows), strict=True)):
            place = _Place(number, window.document, at := i * rows)
            names = (reference.name, candidate.name)
            parts.append((np.arange(at, at + len(pair[0])), *_compare(names, pair, window.ids[at + 1 :], place)))
            advance(len(pair[0]))
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True)
class _Place:
    """The place at which a chunk begins."""

    window: int
    document: int
    position: int

    def check(self, values: Any, problem: str) -> None:
        """Raise EngineError at the first of `values` `[rows]` that is not finite."""
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            at = self.position + int(bad[0, 0])
            raise EngineError(f"{problem} at position {at} of window {self.window} (document {self.document})")


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _compare(names: tuple[str, str], pair: tuple[Any, Any], labels: Sequence[int], place: _Place) -> Iterator[Any]:
    """Yield KL, both negative log-likelihoods and agreement, each `[rows]`, from logits `[rows, vocabulary]`."""
    device, rows = pair[0].device, len(pair[0])
    true = torch.tensor(labels[:rows], device=device)[:, None]
    p, q = (logits.to(device).float() for logits in pair)
    agree = p.argmax(-1) == q.argmax(-1)
    weight, total, p_norm = _exponentials(names[0], p, place)
    _, _, q_norm = _exponentials(names[1], q, place)
    nll = [norm - logits.gather(-1, true)[:, 0].double() for norm, logits in ((p_norm, p), (q_norm, q))]
    difference = p.sub_(q).mul_(weight).masked_fill_(weight == 0, 0).sum(-1).double() / total
    kl = (difference - (p_norm - q_norm)).clamp_(min=0)
    for values in (kl, *nll):
        place.check(values, f"{' and '.join(names)}: one rules out a token that the other, or the text, has")
    return (values.cpu().numpy() for values in (kl, *nll, agree))


def _exponentials(name: str, logits: Any, place: _Place) -> tuple[Any, Any, Any]:
    """exp(logits - largest) `[rows, vocabulary]`, its sum `[rows]`, and the log-sum-exp of the logits `[rows]`."""
    largest = logits.amax(-1, keepdim=True)
    weight = (logits - largest).exp_()
    total = weight.sum(-1).double()
    norm = total.log() + largest[:, 0].double()
    place.check(norm, f"{name}: the logits are not finite (NaN or infinity)")
    return weight, total, norm
