"""Keys and values of the sequences that are decoded together, each in memory of its own.

transformers' cache of a batch is one tensor a layer: padded to the longest sequence, and copied whole for every token.
Here each sequence has its own, as long as it may become, taken once and written in place; the system gives the pages as
they are written. A step runs over one row of tokens, in which those of several sequences follow each other: some of the
prompts of those that are being read, the last token of those that are being answered. All layers but attention see
tokens alone, and torch's `scaled_dot_product_attention` runs over each sequence by itself: no padding, no copy. Where a
model's attention does not let that be done (`Caches.apart`), prompts are read one at a time, and for a token of each
sequence keys and values are padded into one tensor at every step, as transformers would have them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SLACK = 64
"""Tokens that a sliding layer holds beside those that a new one sees, before these move to the beginning again."""


ROUNDING = 0.1
"""Most that rounding in another order moves the logits of a few tokens, by their size."""


class Memory(DynamicLayer):  # type: ignore[misc]
    """Keys and values [1, heads, tokens, head size] of one sequence in a layer."""

    def __init__(self, tokens: int, window: int | None) -> None:
        """Hold a sequence of at most `tokens`, of which a new one sees all, or, itself counted, the last `window`."""
        super().__init__()
        self.is_sliding = window is not None
        self.seen = 0
        self._visible = tokens if window is None else window - 1
        self.room = min(tokens, self._visible + SLACK)
        self._end = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, in the dtype of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        both = (key_states, value_states)
        self.keys, self.values = (new.new_empty(*new.shape[:-2], self.room, new.shape[-1]) for new in both)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; return what they see, themselves included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, past = key_states.shape[-2], self._past
        fits = self._end + new <= self.room
        add = self._append if fits else self._move
        seen = add(self.keys, key_states, past), add(self.values, value_states, past)
        self._end = self._end + new if fits else min(past + new, self._visible)
        self.seen += new
        return seen

    def get_seq_length(self) -> int:
        """Return the tokens seen so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens `update` will return for `query_length` new ones, and the position of the first."""
        return self._past + query_length, self.seen - self._past

    def begin_as(self, other: "Memory") -> None:
        """Hold the tokens that a new one of `other` sees; nothing must be held yet."""
        past = other._past
        self.lazy_initialization(other.keys, other.values)
        self.keys[..., :past, :] = other.keys[..., other._end - past : other._end, :]
        self.values[..., :past, :] = other.values[..., other._end - past : other._end, :]
        self._end, self.seen = past, other.seen

    @property
    def _past(self) -> int:
        """Tokens that a new one sees."""
        return min(self._end, self._visible)

    def mask(self, key_states: Tensor) -> Tensor | None:
        """Say which of the keys that `update` will return each new token sees [new, keys].

        None: all before it, and itself.
        """
        new = key_states.shape[-2]
        if new == 1 or (self._past == 0 and new <= self._visible + 1):
            return None
        return _visible(self._past, new, self._visible, key_states.device)

    def _append(self, kept: Tensor, new: Tensor, past: int) -> Tensor:
        """Write `new` behind what is kept; return it with the `past` tokens before it."""
        tokens = new.shape[-2]
        kept.narrow(-2, self._end, tokens).copy_(new)
        return kept.narrow(-2, self._end - past, past + tokens)

    def _move(self, kept: Tensor, new: Tensor, past: int) -> Tensor:
        """Do the same where there is no place: what the next token sees moves to the beginning."""
        whole = torch.cat([kept.narrow(-2, self._end - past, past), new], dim=-2)
        last = whole[..., max(0, whole.shape[-2] - self._visible) :, :]
        kept[..., : last.shape[-2], :] = last
        return whole


class Row(DynamicLayer):  # type: ignore[misc]
    """A layer of several sequences, the new tokens of which lie in one row.

    `attended`: `attend` was given its keys and values; `masked`: with a mask, the model's own where tokens are few.
    """

    def __init__(self, memories: Sequence[Memory], counts: Sequence[int]) -> None:
        """Take the `memories` of the sequences, and how many tokens each of them adds."""
        super().__init__()
        self.attended = self.masked = False
        self.is_sliding = memories[0].is_sliding
        self.counts, self._memories = list(counts), memories

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add each sequence's tokens to its memory; return the new ones, which lead `attend` to all that they see."""
        news = zip(self._memories, key_states.split(self.counts, 2), value_states.split(self.counts, 2), strict=True)
        seen = [(memory.mask(keys), *memory.update(keys, values)) for memory, keys, values in news]
        key_states.row = self, seen, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the tokens of the longest sequence."""
        return max(memory.seen for memory in self._memories)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of which transformers makes the least of a mask: none is used."""
        return query_length, 0


class Padded(DynamicLayer):  # type: ignore[misc]
    """A layer of several sequences, each of which has a row for its one new token, padded on the left."""

    def __init__(self, memories: Sequence[Memory]) -> None:
        super().__init__()
        self.is_sliding = memories[0].is_sliding
        self._memories = memories

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add a token to each; return all."""
        news = zip(self._memories, key_states.split(1), value_states.split(1), strict=True)
        seen = [memory.update(keys, values) for memory, keys, values in news]
        longest = max(keys.shape[-2] for keys, _ in seen)
        keys, values = (
            torch.cat([pad(row, (0, 0, longest - row.shape[-2], 0)) for row in side])
            for side in zip(*seen, strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        """Return the tokens of the longest sequence."""
        return self._longest.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes for the longest sequence."""
        return self._longest.get_mask_sizes(query_length)

    @property
    def _longest(self) -> Memory:
        return max(self._memories, key=lambda memory: memory.seen)


@lru_cache(maxsize=4)
def _visible(past: int, new: int, visible: int, device: torch.device) -> Tensor:
    """Say which of `past` and `new` keys each new token sees: itself, and the `visible` before it."""
    key = torch.arange(past + new, device=device)
    query = key[past:, None]
    return (key <= query) & (key >= query - visible)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Be transformers' `sdpa`; for a `key` from `Row.update`, sequence by sequence over what each has seen."""
    found = getattr(key, "row", None)
    if found is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    row, seen, values_added = found
    row.attended = getattr(module, "is_causal", True) and value is values_added
    row.masked = attention_mask is not None
    # A token's heads that share keys are like tokens of one head. As heads of their own, which transformers makes of
    # them where there is no mask, each is multiplied by itself: ten times slower in BF16 on a CPU.
    grouped = query.transpose(1, 2).reshape(query.shape[2], key.shape[1], -1, query.shape[-1])
    scale, made = kwargs.get("scaling"), []
    pieces = zip(query.split(row.counts, 2), grouped.split(row.counts), seen, strict=True)
    for own, as_tokens, (mask, keys, values) in pieces:
        if own.shape[2] == 1:
            made.append(scaled_dot_product_attention(as_tokens, keys, values, scale=scale).flatten(1, 2))
        else:
            made.append(sdpa_attention_forward(module, own, keys, values, mask, **kwargs)[0][0])
    return torch.cat(made)[None], None


AttentionInterface.register("sdpa", attend)


class Caches:
    """Makes the caches of a model's sequences.

    `join`: whether sequences can be decoded together: their caches hold only keys and values, a token has one position,
    no layer makes a mask of its own (Doge), and two that were tried gave what each gives alone. `apart`: whether the
    model's attention gets keys and values just as its cache returned them, so that several sequences fit into one row.
    It does not where it is not `sdpa` (sinks, capped logits), makes keys of the latents in its cache, or other values
    of its values (DiffLlama); and within chunks it does not see all that the cache keeps. `dtype`: that of keys and
    values; None where they do not join.
    """

    def __init__(self, model: Any) -> None:
        """Read the model's config and, where sequences join, try a step of two."""
        config = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in layers)
        positions_vary = any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "model", None)))
        self.join = bool(layers) and plain and not positions_vary and not model.config.is_encoder_decoder
        self.apart, self.dtype = False, None
        self._layers, self._per_token = layers, [0] * len(layers)
        if self.join:
            self._try(model, chunked=getattr(config, "attention_chunk_size", None) is not None)

    def of_one(self, tokens: int) -> DynamicCache:
        """Make the cache of a sequence of at most `tokens` tokens."""
        return _cache([self._memory(layer, tokens) or layer for layer in self._layers])

    def of_row(self, caches: Sequence[DynamicCache], counts: Sequence[int]) -> DynamicCache:
        """Make the cache of a row that adds tokens to each sequence's own: so many of the first, of the second, ..."""
        layers = zip(*(cache.layers for cache in caches), strict=True)
        return _cache([Row(each, counts) if isinstance(each[0], Memory) else each[0] for each in layers])

    def of_step(self, caches: Sequence[DynamicCache]) -> DynamicCache:
        """Make the cache of a step that adds a token to each sequence's own: in one row, or (not `apart`) in many."""
        if self.apart:
            return self.of_row(caches, [1] * len(caches))
        layers = zip(*(cache.layers for cache in caches), strict=True)
        return _cache([Padded(each) if isinstance(each[0], Memory) else each[0] for each in layers])

    @staticmethod
    def copy(cache: DynamicCache, into: DynamicCache) -> None:
        """Let a sequence's cache that is new, `into`, hold what `cache` holds of another, and go on from there."""
        for layer, other in zip(into.layers, cache.layers, strict=True):
            if isinstance(layer, Memory):
                layer.begin_as(other)

    def nbytes(self, tokens: int) -> int:
        """Count what the cache of a sequence of at most `tokens` takes; 0 where sequences do not join."""
        memories = (self._memory(layer, tokens) for layer in self._layers)
        return sum(n * memory.room for n, memory in zip(self._per_token, memories, strict=True) if memory)

    def longest(self, most: int, room: int) -> int:
        """Return the most tokens, up to `most`, of a sequence whose cache takes no more than `room` bytes."""
        return bisect_right(range(1, most + 1), room, key=self.nbytes)

    def decode(self, model: Any, cache: DynamicCache, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Read the last token of each sequence, with the `cache` of a step; return the logits [sequences, vocabulary].

        `lengths` are those of the sequences, that token included.
        """
        ids, ends = torch.tensor([tokens], device=model.device), torch.tensor([lengths], device=model.device)
        mask = None
        if not self.apart:
            ids, ends, longest = ids.T, ends.T, max(lengths)
            # With the padding on the left: 0 where a shorter sequence has not begun.
            mask = (torch.arange(longest, device=model.device) >= longest - ends).long()
        logits: Tensor = model(
            input_ids=ids, position_ids=ends - 1, attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits
        return logits[0] if self.apart else logits[:, -1]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _try(self, model: Any, *, chunked: bool) -> None:
        """Decode a token of two sequences together in one way, else in the other: each must be as if it were alone."""
        sequences = [torch.arange(begin, end, device=model.device)[None] for begin, end in ((1, 6), (6, 9))]

        def read(ids: Tensor, **more: Any) -> Tensor:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            logits: Tensor = model(input_ids=ids, position_ids=positions, **more).logits[0, -1]
            return logits

        def agree() -> bool:
            caches = [self.of_one(ids.shape[1]) for ids in sequences]
            for ids, cache in zip(sequences, caches, strict=True):
                read(ids[:, :-1], past_key_values=cache, use_cache=True)
            taken = [layer if isinstance(layer, Memory) else None for layer in caches[0].layers]
            self._per_token = [sum(t[..., :1, :].nbytes for t in (m.keys, m.values)) if m else 0 for m in taken]
            self.dtype = next(m.dtype for m in taken if m)
            step = self.of_step(caches)
            rows = [layer for layer in step.layers if isinstance(layer, Row)]
            with suppress(Exception):  # from attention of another kind
                last, lengths = [int(ids[0, -1]) for ids in sequences], [ids.shape[1] for ids in sequences]
                found = self.decode(model, step, last, lengths)
                self.join = not any(row.masked for row in rows)
                near = (found - expected).float().norm(dim=-1) <= ROUNDING * expected.float().norm(dim=-1)
                return self.join and bool(near.all()) and all(row.attended for row in rows)
            return False

        expected = torch.stack([read(ids, use_cache=False) for ids in sequences])
        self.apart = not chunked
        self.apart = self.apart and agree()
        self.join = self.apart or (self.join and agree())
        if not self.join:
            self.dtype, self._per_token = None, [0] * len(self._layers)

    @staticmethod
    def _memory(layer: Any, tokens: int) -> Memory | None:
        return None if isinstance(layer, DummyLayer) else Memory(tokens, getattr(layer, "sliding_window", None))


def _cache(layers: list[Any]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache
