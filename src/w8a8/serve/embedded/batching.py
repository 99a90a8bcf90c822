"""Many requests in one model, for the embedded engine: continuous batching over caches of its own.

transformers' own continuous batching, paged attention (5.23), refuses models whose layers differ in their heads, as
Gemma 4's do, applies the sampling settings of the first request to all, and knows no stop strings.

One thread owns the model. In a turn it reads up to `CHUNK` tokens of waiting prompts, all at once, each into a cache of
its own (`caches`) that may begin with what another has read (`prefixes`), and then decodes one token for every running
sequence at once. A sequence is admitted, first come first served, when there is memory for all that it may become. It
joins the running ones once its prompt has been read, and leaves as soon as it has ended. Models whose caches cannot be
joined this way (linear attention, positions other than one per token) are run by `model.generate`, one request after
another.
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
from w8a8.serve.embedded.admitted import Admitted, Piece, read_scored
from w8a8.serve.embedded.caches import Caches
from w8a8.serve.embedded.prefixes import Prefixes
from w8a8.serve.embedded.stream import LATER, Stream, one_line

MAX_RUNNING = 16
"""Sequences decoded together; more wait, first come first served."""

MAX_WAITING = 128
"""Requests that wait; one more is refused."""

CHUNK = 512
"""Prompt tokens read between two decoding steps, so that a long prompt does not stall those who are being answered."""

SHUTTING_DOWN = "the server is shutting down"

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
        self._prefixes = Prefixes(self.caches)
        self.context = context if room is None else self.caches.longest(context, room)
        self._model = model
        self._limit = MAX_RUNNING if self.caches.join else 1
        self._waiting: deque[Stream] = deque()
        self._changed = threading.Condition()
        self._reading: list[Admitted] = []
        self._running: list[Admitted] = []
        self._step: DynamicCache | None = None
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
        if room < (1 if wanted is None else wanted):
            asked = f"{prompt} tokens of prompt" + (f" and max_tokens {wanted}" if wanted else "")
            raise HTTPException(400, f"this model's context is {self.context} tokens, and {asked} do not fit into it")
        config.max_new_tokens = room if wanted is None else wanted

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while not self.stopping:
                # 1) Admit as many requests as this turn reads; wait where there is nothing else to do.
                self._admit()
                # 2) Read up to CHUNK tokens of their prompts.
                self._read()
                # 3) Decode a token for every sequence whose prompt has been read.
                if self._running:
                    self._decode()
        self._fail_all()

    def _admit(self) -> None:
        while (stream := self._next_waiting()) is not None:
            self._reading.append(Admitted(stream, self.caches))
            self._prefixes.begin(self._reading[-1])
            stream.begin()

    def _next_waiting(self) -> Stream | None:
        """Take the next request that this turn reads out of the queue; wait where there is nothing else to do."""
        with self._changed:
            while not self.stopping and len(self._begun) < self._limit and self._unread < CHUNK:
                while self._waiting and self._waiting[0].cancelled:
                    self._waiting.popleft()
                if self._waiting and self._fits(self._waiting[0]):
                    return self._waiting.popleft()
                if self._waiting or self._begun:
                    break
                self._changed.wait()
        return None

    def _fits(self, stream: Stream) -> bool:
        """Say whether there is memory for a request beside those that run; for one alone there is, by `context`."""
        left = self._left
        return self._prefixes.shrink(None if left is None else left - self.caches.nbytes(stream.longest))

    @property
    def _left(self) -> int | None:
        """Bytes that no sequence has."""
        return None if self.room is None else self.room - sum(sequence.nbytes for sequence in self._begun)

    @property
    def _begun(self) -> list[Admitted]:
        return [*self._reading, *self._running]

    @property
    def _unread(self) -> int:
        """Tokens of prompts that are still to be read."""
        return sum(sequence.unread for sequence in self._reading)

    def _read(self) -> None:
        """Read up to CHUNK tokens of prompts; sequences whose last ones were among them join those that run."""
        for pieces in self._pieces():
            try:
                found = self._logits(pieces)
            except Exception as error:  # noqa: BLE001 - one request's, not the server's end
                _log.exception("a request failed")
                self._give_up(pieces, error)
                continue
            for piece, logits in zip(pieces, found, strict=True):
                sequence = piece.sequence
                sequence.read = piece.end
                if sequence.read == sequence.pause:
                    self._prefixes.keep(sequence, self._left)
                if not (sequence.unread or sequence.ended):
                    sequence.stream.choose(logits)
        joining = [sequence for sequence in self._reading if not (sequence.unread or sequence.ended)]
        self._reading = [sequence for sequence in self._reading if sequence.unread and not sequence.ended]
        if joining:
            self._run_together([*self._running, *joining])

    def _pieces(self) -> list[list[Piece]]:
        """Choose what this turn reads, forward by forward: all that can be is in one."""
        together: list[Piece] = []
        alone: list[Piece] = []
        left = CHUNK
        for sequence in self._reading:
            if left > 0 and not sequence.ended:
                piece = Piece(sequence, sequence.read, sequence.read + sequence.next(left))
                left -= piece.end - piece.begin
                (alone if sequence.alone else together).append(piece)
        return [*filter(None, [together]), *([piece] for piece in alone)]

    def _give_up(self, pieces: Sequence[Piece], error: Exception) -> None:
        """Fail the one sequence that was read; of several, let each be read alone, from its beginning."""
        if len(pieces) == 1:
            pieces[0].sequence.stream.fail(one_line(error))
            return
        parted = {piece.sequence for piece in pieces}
        self._reading = [
            Admitted(sequence.stream, self.caches, alone=True) if sequence in parted else sequence
            for sequence in self._reading
        ]

    def _logits(self, pieces: Sequence[Piece]) -> Tensor | list[Tensor]:
        """Read pieces of prompts; return the logits [vocabulary] of the last token of each."""
        sequences = [piece.sequence for piece in pieces]
        if self._limit == 1:
            self._generate(sequences[0].stream)
            return [torch.empty(0)]
        if sequences[0].alone:
            return [pieces[0].logits(self._model)]
        counts = [piece.end - piece.begin for piece in pieces]
        return self._of_row(pieces, self.caches.of_row([sequence.cache for sequence in sequences], counts))

    def _of_row(self, pieces: Sequence[Piece], cache: DynamicCache) -> Tensor:
        """Read pieces of several sequences as one row; return the logits [pieces, vocabulary] of their last tokens."""
        device = self._model.device
        tokens = [token for piece in pieces for token in piece.tokens]
        positions = [position for piece in pieces for position in range(piece.begin, piece.end)]
        last = torch.tensor([piece.end - piece.begin for piece in pieces], device=device).cumsum(0) - 1
        logits: Tensor = self._model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits[0]
        return logits if len(logits) == len(pieces) else logits[last]

    def _run_together(self, sequences: Sequence[Admitted]) -> None:
        self._running = list(sequences)
        self._step = self.caches.of_step([sequence.cache for sequence in sequences]) if sequences else None

    def _decode(self) -> None:
        """Decode one more token for every running sequence."""
        try:
            for sequence, row in zip(self._running, self._next(), strict=True):
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

    def _next(self) -> Tensor:
        """Return the logits [running, vocabulary] for the next tokens."""
        # The cache lacks one token of every sequence: its last.
        streams = [sequence.stream for sequence in self._running]
        last, lengths = [stream.tokens[-1] for stream in streams], [stream.length for stream in streams]
        return self.caches.decode(self._model, self._step, last, lengths)

    def _generate(self, stream: Stream) -> None:
        """Run one request to its end with `model.generate`."""
        config = stream.config
        if (seed := getattr(config, "seed", None)) is not None:
            torch.manual_seed(seed)
        if stream.scores_prompt:
            read_scored(self._model, stream, 0, input_ids=stream.inputs["input_ids"], use_cache=False)
        steps = _Steps(stream, self)
        if not config.max_new_tokens:
            stream.choose(steps.logits)
            return
        alone = GenerationConfig.from_dict({**config.to_dict(), "stop_strings": None})
        hook = self._model.register_forward_hook(steps.listen)
        try:
            self._model.generate(**stream.inputs, generation_config=alone, stopping_criteria=[steps])
        finally:
            hook.remove()
        if self.stopping and not stream.done:
            stream.fail(SHUTTING_DOWN)

    def _fail_all(self) -> None:
        for stream in [*(sequence.stream for sequence in self._begun), *self._waiting]:
            stream.fail(SHUTTING_DOWN)


class _Steps(StoppingCriteria):  # type: ignore[misc]
    """Pass on every token that `model.generate` makes, and tell it whether to stop."""

    def __init__(self, stream: Stream, batcher: Batcher) -> None:
        self._stream, self._batcher = stream, batcher
        self.logits = torch.empty(0)

    def listen(self, _model: Any, _inputs: Any, output: Any) -> None:
        """Keep the logits that a token is chosen by, as the model's hook."""
        self.logits = output.logits[0, -1]

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        if not self._stream.done:
            self._stream.take(int(input_ids[0, -1]), self.logits)
        stop = self._stream.done or self._stream.cancelled or self._batcher.stopping
        return torch.tensor([stop], device=input_ids.device)
