"""Keys and values of the sequences that are decoded together, each in memory of its own.

transformers' cache of a batch is one tensor a layer: padded to the longest sequence, and copied whole for every token.
Here each sequence has its own, as long as it may become, taken once and written in place; the system gives the pages as
they are written. A step adds a token to every sequence, and torch's `scaled_dot_product_attention` runs over each by
itself: no padding, no mask, no copy. Where a model's attention does not let that be done (`Caches.apart`), keys and
values are padded into one tensor at every step, as transformers would have them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SLACK = 64
"""Tokens that a sliding layer holds beside those that a new one sees, before these move to the beginning again."""


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
        seen = self._add(self.keys, key_states), self._add(self.values, value_states)
        new = key_states.shape[-2]
        fits = self._end + new <= self.room
        self._end = self._end + new if fits else min(self._past + new, self._visible)
        self.seen += new
        return seen

    def get_seq_length(self) -> int:
        """Return the tokens seen so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens `update` will return for `query_length` new ones, and the position of the first."""
        return self._past + query_length, self.seen - self._past

    @property
    def _past(self) -> int:
        """Tokens that a new one sees."""
        return min(self._end, self._visible)

    def _add(self, kept: Tensor, new: Tensor) -> Tensor:
        begin, end = self._end - self._past, self._end + new.shape[-2]
        if end <= self.room:
            kept[..., self._end : end, :] = new
            return kept[..., begin:end, :]
        whole = torch.cat([kept[..., begin : self._end, :], new], dim=-2)
        last = whole[..., max(0, whole.shape[-2] - self._visible) :, :]
        kept[..., : last.shape[-2], :] = last
        return whole


class Rows(DynamicLayer):  # type: ignore[misc]
    """A layer of several sequences, for steps that add a token to each; `attended`: `attend` was given its keys."""

    def __init__(self, rows: Sequence[Memory], *, apart: bool) -> None:
        super().__init__()
        self.attended = False
        self.is_sliding = rows[0].is_sliding
        self._rows, self._apart = rows, apart

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add a token to each; return all, padded on the left, or `apart` the new ones, which lead `attend` to all."""
        seen = [row.update(key_states[i : i + 1], value_states[i : i + 1]) for i, row in enumerate(self._rows)]
        if self._apart:
            key_states.rows = self, seen
            return key_states, value_states
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
        """Return the sizes for the longest sequence; `apart`, those for which transformers makes no mask."""
        return (query_length, 0) if self._apart else self._longest.get_mask_sizes(query_length)

    @property
    def _longest(self) -> Memory:
        return max(self._rows, key=lambda row: row.seen)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Be transformers' `sdpa`; for a `key` from `Rows.update`, row by row over what that row has seen."""
    found = getattr(key, "rows", None)
    if found is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layer, rows = found
    layer.attended = True
    # The heads that share keys are like tokens of one head. As heads of their own, which transformers makes of them
    # where there is no mask, each is multiplied by itself: ten times slower in BF16 on a CPU.
    grouped = query.reshape(len(rows), key.shape[1], -1, query.shape[-1])
    scale = kwargs.get("scaling")
    each = [
        scaled_dot_product_attention(grouped[i : i + 1], keys, values, scale=scale).flatten(1, 2)
        for i, (keys, values) in enumerate(rows)
    ]
    return torch.cat(each)[:, None], None


AttentionInterface.register("sdpa", attend)


class Caches:
    """Makes the caches of a model's sequences.

    `join`: whether sequences can be decoded together: their caches hold only keys and values, and a token has one
    position. `apart`: whether the model's attention gets keys and values just as its cache returned them. It does not
    where it is not `sdpa` (sinks, capped logits), or makes keys of the latents in its cache; and within chunks it does
    not see all that the cache keeps. `dtype`: that of keys and values; None where they do not join.
    """

    def __init__(self, model: Any) -> None:
        """Read the model's config and, where sequences join, try a step of two."""
        config = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in layers)
        positions_vary = any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "model", None)))
        self.join = bool(layers) and plain and not positions_vary and not model.config.is_encoder_decoder
        self.apart, self.dtype = self.join and getattr(config, "attention_chunk_size", None) is None, None
        self._layers, self._per_token = layers, [0] * len(layers)
        if self.join:
            self._try(model)

    def of_one(self, tokens: int) -> DynamicCache:
        """Make the cache of a sequence of at most `tokens` tokens."""
        return _cache([self._memory(layer, tokens) or layer for layer in self._layers])

    def of_rows(self, caches: Sequence[DynamicCache]) -> DynamicCache:
        """Make the cache of a step of several sequences, which adds to each one's own."""
        layers = zip(*(cache.layers for cache in caches), strict=True)
        return _cache([Rows(row, apart=self.apart) if isinstance(row[0], Memory) else row[0] for row in layers])

    def nbytes(self, tokens: int) -> int:
        """Count what the cache of a sequence of at most `tokens` takes; 0 where sequences do not join."""
        memories = (self._memory(layer, tokens) for layer in self._layers)
        return sum(n * memory.room for n, memory in zip(self._per_token, memories, strict=True) if memory)

    def longest(self, most: int, room: int) -> int:
        """Return the most tokens, up to `most`, of a sequence whose cache takes no more than `room` bytes."""
        return bisect_right(range(1, most + 1), room, key=self.nbytes)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _try(self, model: Any) -> None:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        caches = [self.of_one(2) for _ in range(2)]
        for cache in caches:
            model(input_ids=token, position_ids=token, past_key_values=cache, use_cache=True)
        taken = [layer if isinstance(layer, Memory) else None for layer in caches[0].layers]
        self._per_token = [sum(t[..., :1, :].nbytes for t in (m.keys, m.values)) if m else 0 for m in taken]
        self.dtype = next(m.dtype for m in taken if m)
        rows, tokens = self.of_rows(caches), token.expand(2, 1)
        with suppress(Exception):  # from attention of another kind
            model(input_ids=tokens, position_ids=tokens + 1, past_key_values=rows, use_cache=True)
        self.apart = self.apart and all(layer.attended for layer in rows.layers if isinstance(layer, Rows))

    @staticmethod
    def _memory(layer: Any, tokens: int) -> Memory | None:
        return None if isinstance(layer, DummyLayer) else Memory(tokens, getattr(layer, "sliding_window", None))


def _cache(layers: list[Any]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache
