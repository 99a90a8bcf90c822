"""Many requests in one model, for the embedded engine: continuous batching over transformers' own caches.

transformers' own continuous batching, paged attention (5.23), refuses models whose layers differ in their heads, as
Gemma 4's do, applies the sampling settings of the first request to all, and knows no stop strings.

One thread owns the model. In a turn it reads up to `CHUNK` tokens of waiting prompts, each into a cache of its own,
and then decodes one token for every running sequence at once. A sequence joins the running ones by being aligned to
the right: the shorter caches are padded on the left, and the attention mask covers the padding. One that ends leaves
at once, and the padding shrinks with it. A model whose cache cannot be joined this way (linear attention, positions
other than one per token) is run by `model.generate`, one request after another.
"""

import logging
import threading
from queue import Empty, SimpleQueue
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, StoppingCriteria
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from w8a8.serve.embedded.stream import Stream, one_line

MAX_RUNNING = 16
"""Sequences decoded together; more wait, first come first served."""

CHUNK = 512
"""Prompt tokens read between two decoding steps, so that a long prompt does not stall those who are being answered."""

SHUTTING_DOWN = "the server is shutting down"

TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
"""The inputs a processor returns for a prompt without images; for one sequence alone only the first tells anything."""

_log = logging.getLogger(__name__)


class Batcher:
    """Run all requests in one model, on a thread of its own."""

    def __init__(self, model: Any, context: int) -> None:
        """Start the thread; `context` limits a sequence's tokens, prompt and answer together."""
        self.context = context
        self._model = model
        self._limit = MAX_RUNNING if joinable(model) else 1
        self._waiting: SimpleQueue[Stream | None] = SimpleQueue()
        self._reading: _Prompt | None = None
        self._running: list[Stream] = []
        self._cache = self._new_cache()
        self.stopping = False
        self._thread = threading.Thread(target=self._run, name="w8a8-batcher", daemon=True)
        self._thread.start()

    # --- on the event loop ----------------------------------------------------------------------------------------

    def submit(self, inputs: dict[str, Tensor], config: GenerationConfig, tokenizer: Any, parser: Any = None) -> Stream:
        """Queue a request, whose answer comes out of the stream returned; the arguments are a `Stream`'s.

        Raises HTTPException 400 for a request longer than the context, 503 when the engine is stopping.
        """
        prompt = inputs["input_ids"].shape[-1]
        self._fit(prompt, config)
        processors = self._model._get_logits_processor(config, input_ids_seq_length=prompt, device=self._model.device)
        stream = Stream(inputs, config, tokenizer, processors or None, parser)
        if self.stopping:
            raise HTTPException(503, SHUTTING_DOWN)
        self._waiting.put(stream)
        return stream

    def stop(self) -> None:
        """End every request with an error, and the thread after its current step, without waiting for it."""
        self.stopping = True
        self._waiting.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the thread to end."""
        self._thread.join(seconds)

    def _fit(self, prompt: int, config: GenerationConfig) -> None:
        room = self.context - prompt
        wanted = config.max_new_tokens
        if prompt == 0:
            raise HTTPException(400, "the prompt is empty")
        if room < (wanted or 1):
            asked = f"{prompt} tokens of prompt" + (f" and max_tokens {wanted}" if wanted else "")
            raise HTTPException(400, f"this model's context is {self.context} tokens, and {asked} do not fit into it")
        config.max_new_tokens = wanted or room

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while not self.stopping:
                # 1) Read waiting prompts, up to CHUNK tokens of them.
                read = 0
                while read < CHUNK and self._admit():
                    read += self._read()
                # 2) Decode a token for every sequence whose prompt has been read.
                if self._running:
                    self._decode()
        self._fail_all()

    def _admit(self) -> bool:
        """Say whether there is a prompt to read; wait for one if there is nothing else to do."""
        while self._reading is None and len(self._running) < self._limit and not self.stopping:
            try:
                stream = self._waiting.get(block=not self._running)
            except Empty:
                break
            if stream is not None and not stream.cancelled:
                self._reading = _Prompt(stream, self._new_cache())
        return self._reading is not None

    def _read(self) -> int:
        """Read a chunk of the current prompt; after the last its sequence joins the others. Return the tokens read."""
        prompt = self._reading
        assert prompt is not None
        read = 0
        try:
            if self._limit == 1:
                self._generate(prompt.stream)
            elif not prompt.stream.cancelled:
                read = prompt.read(self._model)
                if not prompt.complete:
                    return read
                self._join(prompt)
        except Exception as error:  # noqa: BLE001 - one request's, not the server's end
            _log.exception("a request failed")
            prompt.stream.fail(one_line(error))
        self._reading = None
        return read

    def _join(self, prompt: "_Prompt") -> None:
        prompt.stream.choose(prompt.logits)
        if prompt.stream.done:
            return
        if self._running:
            length = max(self._cache.get_seq_length(), prompt.cache.get_seq_length())
            for ours, theirs in zip(self._cache.layers, prompt.cache.layers, strict=True):
                _align(ours, length)
                _align(theirs, length)
                if ours.keys is not None:
                    ours.keys = torch.cat([ours.keys, theirs.keys])
                    ours.values = torch.cat([ours.values, theirs.values])
        else:
            self._cache = prompt.cache
        self._running.append(prompt.stream)

    def _decode(self) -> None:
        """Decode one more token for every running sequence."""
        try:
            # The cache lacks one token of every sequence: its last.
            logits = self._model(**self._inputs(), past_key_values=self._cache, use_cache=True).logits[:, -1]
            for stream, row in zip(self._running, logits, strict=True):
                if not stream.cancelled:
                    stream.choose(row)
            self._leave()
        except Exception as error:  # noqa: BLE001 - one request's, not the server's end
            _log.exception("decoding failed")
            for stream in self._running:
                if not stream.done:
                    stream.fail(one_line(error))
            self._running = []

    def _inputs(self) -> dict[str, Tensor | None]:
        device = self._model.device
        lengths = torch.tensor([stream.length for stream in self._running], device=device)
        longest = int(lengths.max())
        # With the padding on the left: 0 where a shorter sequence has not begun.
        mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
        return {
            "input_ids": torch.tensor([[stream.tokens[-1]] for stream in self._running], device=device),
            "position_ids": lengths[:, None] - 1,
            "attention_mask": None if bool(mask.all()) else mask.long(),
        }

    def _leave(self) -> None:
        """Take the sequences that have ended out of the batch, and the padding that only they needed."""
        stay = [i for i, stream in enumerate(self._running) if not (stream.done or stream.cancelled)]
        if len(stay) == len(self._running):
            return
        self._running = [self._running[i] for i in stay]
        if not stay:
            self._cache = self._new_cache()
            return
        self._cache.batch_select_indices(torch.tensor(stay, device=self._model.device))
        for layer in self._cache.layers:
            _align(layer, max(stream.length for stream in self._running) - 1)

    def _generate(self, stream: Stream) -> None:
        """Run one request to its end with `model.generate`."""
        config = stream.config
        if (seed := getattr(config, "seed", None)) is not None:
            torch.manual_seed(seed)
        alone = GenerationConfig.from_dict({**config.to_dict(), "stop_strings": None})
        self._model.generate(**stream.inputs, generation_config=alone, stopping_criteria=[_Steps(stream, self)])
        if self.stopping and not stream.done:
            stream.fail(SHUTTING_DOWN)

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config.get_text_config(decoder=True))

    def _fail_all(self) -> None:
        streams = [*self._running, *([self._reading.stream] if self._reading else [])]
        while not self._waiting.empty():
            if (stream := self._waiting.get()) is not None:
                streams.append(stream)
        for stream in streams:
            stream.fail(SHUTTING_DOWN)


class _Prompt:
    """A prompt that is being read into a cache of its own."""

    def __init__(self, stream: Stream, cache: DynamicCache) -> None:
        self.stream, self.cache = stream, cache
        self.complete = False
        self.logits = torch.empty(0)

    def read(self, model: Any) -> int:
        """Read the next chunk, or all of a prompt with images; return the number of tokens read.

        The last chunk leaves `logits` [vocabulary].
        """
        inputs = self.stream.inputs
        ids, begin = inputs["input_ids"], self.cache.get_seq_length()
        if inputs.keys() <= TEXT_INPUTS:
            chunk = ids[:, begin : begin + CHUNK]
            positions = torch.arange(begin, begin + chunk.shape[1], device=ids.device)[None]
            more = {"input_ids": chunk, "position_ids": positions, "past_key_values": self.cache}
        else:
            chunk = ids
            more = model.prepare_inputs_for_generation(
                is_first_iteration=True, past_key_values=self.cache, use_cache=True, **inputs
            )
        self.logits = model(**{**more, "use_cache": True, "logits_to_keep": 1}).logits[0, -1]
        self.complete = begin + chunk.shape[1] == ids.shape[1]
        return int(chunk.shape[1])


class _Steps(StoppingCriteria):  # type: ignore[misc]
    """Pass on every token that `model.generate` makes, and tell it whether to stop."""

    def __init__(self, stream: Stream, batcher: Batcher) -> None:
        self._stream, self._batcher = stream, batcher

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        if not self._stream.done:
            self._stream.take(int(input_ids[0, -1]))
        stop = self._stream.done or self._stream.cancelled or self._batcher.stopping
        return torch.tensor([stop], device=input_ids.device)


def joinable(model: Any) -> bool:
    """Say whether sequences can be decoded together: caches hold only keys and values, and a token has one position."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in cache.layers)
    positions_vary = any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "model", None)))
    return bool(cache.layers) and plain and not positions_vary and not model.config.is_encoder_decoder


def _align(layer: Any, length: int) -> None:
    """Pad or crop the left of a cache layer [batch, heads, tokens, head size] so that it has `length` tokens."""
    if layer.keys is None:  # it shares the keys and values of another
        return
    kept = length
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
        kept = min(length, layer.sliding_window - 1)
    more = kept - layer.keys.shape[-2]
    layer.keys = pad(layer.keys, (0, 0, more, 0))
    layer.values = pad(layer.values, (0, 0, more, 0))
