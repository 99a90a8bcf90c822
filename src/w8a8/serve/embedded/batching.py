"""Many requests in one model, for the embedded engine: continuous batching over caches of its own.

transformers' own continuous batching, paged attention (5.23), refuses models whose layers differ in their heads, as
Gemma 4's do, applies the sampling settings of the first request to all, and knows no stop strings.

One thread owns the model. In a turn it reads up to `CHUNK` tokens of waiting prompts, each into a cache of its own
(`caches`), and then decodes one token for every running sequence at once. A sequence is admitted, first come first
served, when there is memory for all that it may become. It joins the running ones once its prompt has been read, and
leaves as soon as it has ended. Models whose caches cannot be joined this way (linear attention, positions other than
one per token) are run by `model.generate`, one request after another.
"""

import copy
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

from w8a8.machine import gigabytes
from w8a8.serve.embedded.caches import Caches
from w8a8.serve.embedded.stream import LATER, Stream, one_line

MAX_RUNNING = 16
"""Sequences decoded together; more wait, first come first served."""

MAX_WAITING = 128
"""Requests that wait; one more is refused."""

CHUNK = 512
"""Prompt tokens read between two decoding steps, so that a long prompt does not stall those who are being answered."""

SHUTTING_DOWN = "the server is shutting down"

TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
"""The inputs a processor returns for a prompt without images; for one sequence alone only the first tells anything."""

_log = logging.getLogger(__name__)


class Batcher:
    """Run all requests in one model, on a thread of its own."""

    def __init__(self, model: Any, context: int, room: int | None = None) -> None:
        """Start the thread; `context` limits a sequence's tokens, prompt and answer together.

        The caches of all sequences that run take no more than `room` bytes (None: any number), and `context` becomes
        shorter where one sequence would take more.
        """
        self.caches = Caches(model)
        self.room = room
        self.context = context if room is None else self.caches.longest(context, room)
        self._model = model
        self._limit = MAX_RUNNING if self.caches.join else 1
        self._waiting: deque[Stream] = deque()
        self._changed = threading.Condition()
        self._reading: _Sequence | None = None
        self._running: list[_Sequence] = []
        self._rows: DynamicCache | None = None
        self.stopping = False
        self._thread = threading.Thread(target=self._run, name="w8a8-batcher", daemon=True)
        self._thread.start()

    @property
    def about(self) -> str:
        """`memory` in words."""
        cache = self.memory
        if cache["dtype"] is None:
            return "this model's cache is transformers' own: requests are answered one after another"
        room = f"; {gigabytes(cache['bytes'])} for them hold {cache['tokens']:,} tokens" if cache["bytes"] else ""
        return f"keys and values in {cache['dtype']}{room}; a request may have {self.context:,}"

    @property
    def memory(self) -> dict[str, Any]:
        """The dtype of keys and values (null: transformers' own cache), the bytes for them and the tokens that fit.

        The tokens are those of requests as long as the context; null where nothing is counted.
        """
        each = self.caches.nbytes(self.context)
        tokens = self.room // each * self.context if self.room is not None and each else None
        dtype = str(self.caches.dtype).removeprefix("torch.") if self.caches.dtype else None
        return {"dtype": dtype, "bytes": self.room, "tokens": tokens}

    # --- on the event loop ----------------------------------------------------------------------------------------

    def submit(self, inputs: dict[str, Tensor], config: GenerationConfig, tokenizer: Any, parser: Any = None) -> Stream:
        """Queue a request, whose answer comes out of the stream returned; the arguments are a `Stream`'s.

        Raises HTTPException 400 for a request longer than the context, 503 when too many wait or the engine is
        stopping.
        """
        prompt = inputs["input_ids"].shape[-1]
        self._fit(prompt, config)
        others = copy.copy(config)
        others.temperature = others.top_k = others.top_p = others.min_p = None  # `sample` does these
        processors = self._model._get_logits_processor(others, input_ids_seq_length=prompt, device=self._model.device)
        stream = Stream(inputs, config, tokenizer, processors or None, parser)
        with self._changed:
            if self.stopping:
                raise HTTPException(503, SHUTTING_DOWN)
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.cancelled)
            if len(self._waiting) >= MAX_WAITING:
                raise HTTPException(503, f"{MAX_WAITING} requests are waiting already; try again later", LATER)
            self._waiting.append(stream)
            self._changed.notify()
        return stream

    def stop(self) -> None:
        """End every request with an error, and the thread after its current step, without waiting for it."""
        with self._changed:
            self.stopping = True
            self._changed.notify()

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
        with self._changed:
            while self._reading is None and len(self._running) < self._limit and not self.stopping:
                while self._waiting and self._waiting[0].cancelled:
                    self._waiting.popleft()
                if self._waiting and (not self._running or self._fits(self._waiting[0])):
                    self._reading = _Sequence(self._waiting.popleft(), self.caches)
                    self._reading.stream.begin()
                elif self._waiting or self._running:
                    break
                else:
                    self._changed.wait()
        return self._reading is not None

    def _fits(self, stream: Stream) -> bool:
        """Say whether there is memory for a request beside those that run; for one alone there is, by `context`."""
        taken = sum(sequence.nbytes for sequence in self._running)
        return self.room is None or taken + self.caches.nbytes(stream.longest) <= self.room

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
                prompt.stream.choose(prompt.logits)
                if not prompt.stream.done:
                    self._run_together([*self._running, prompt])
        except Exception as error:  # noqa: BLE001 - one request's, not the server's end
            _log.exception("a request failed")
            prompt.stream.fail(one_line(error))
        self._reading = None
        return read

    def _run_together(self, sequences: Sequence["_Sequence"]) -> None:
        self._running = list(sequences)
        self._rows = self.caches.of_rows([sequence.cache for sequence in sequences]) if sequences else None

    def _decode(self) -> None:
        """Decode one more token for every running sequence."""
        try:
            # The cache lacks one token of every sequence: its last.
            logits = self._model(**self._inputs(), past_key_values=self._rows, use_cache=True).logits[:, -1]
            for sequence, row in zip(self._running, logits, strict=True):
                if not sequence.stream.cancelled:
                    sequence.stream.choose(row)
            staying = [sequence for sequence in self._running if not sequence.ended]
            if len(staying) < len(self._running):
                self._run_together(staying)
        except Exception as error:  # noqa: BLE001 - one request's, not the server's end
            _log.exception("decoding failed")
            for sequence in self._running:
                if not sequence.stream.done:
                    sequence.stream.fail(one_line(error))
            self._run_together([])

    def _inputs(self) -> dict[str, Tensor | None]:
        device = self._model.device
        last = [[sequence.stream.tokens[-1]] for sequence in self._running]
        lengths = torch.tensor([[sequence.stream.length] for sequence in self._running], device=device)
        # With the padding on the left: 0 where a shorter sequence has not begun.
        longest = int(lengths.max())
        mask = None if self.caches.apart else (torch.arange(longest, device=device) >= longest - lengths).long()
        return {
            "input_ids": torch.tensor(last, device=device),
            "position_ids": lengths - 1,
            "attention_mask": mask,
        }

    def _generate(self, stream: Stream) -> None:
        """Run one request to its end with `model.generate`."""
        config = stream.config
        if (seed := getattr(config, "seed", None)) is not None:
            torch.manual_seed(seed)
        alone = GenerationConfig.from_dict({**config.to_dict(), "stop_strings": None})
        self._model.generate(**stream.inputs, generation_config=alone, stopping_criteria=[_Steps(stream, self)])
        if self.stopping and not stream.done:
            stream.fail(SHUTTING_DOWN)

    def _fail_all(self) -> None:
        sequences = [*self._running, *([self._reading] if self._reading else [])]
        for stream in [*(sequence.stream for sequence in sequences), *self._waiting]:
            stream.fail(SHUTTING_DOWN)


class _Sequence:
    """A request that has been admitted, and its cache."""

    def __init__(self, stream: Stream, caches: Caches) -> None:
        self.stream = stream
        self.cache, self.nbytes = caches.of_one(stream.longest), caches.nbytes(stream.longest)
        self.complete = False
        self.logits = torch.empty(0)

    @property
    def ended(self) -> bool:
        """Whether no more is to be decoded."""
        return self.stream.done or self.stream.cancelled

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
