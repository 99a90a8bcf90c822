"""Count the bytes of KV cache that a GPU needs, as vLLM 0.32 allocates it.

vLLM gives every request whole blocks out of one pool, and all blocks have the same number of bytes. Where layers differ
(sliding windows next to full attention, other head sizes, linear attention), it sorts them into groups of as many
layers as its scarcest kind has, gives the layers that are cheaper per token longer blocks, and each group takes blocks
of its own (`v1/core/kv_cache_utils.py`). A sliding-window layer keeps its window, what the batches in flight may add to
it, and one block because a window need not start with one (`SlidingWindowSpec`); one block of the pool is never used.
"""

from collections import Counter
from dataclasses import dataclass, replace

from w8a8.memory.model import Layer

BLOCK_TOKENS = 16
CONCURRENT_BATCHES = 2
"""With asynchronous scheduling, the default, one batch is prepared while another runs."""

MAMBA_STATES = 2
"""With prefix caching, the default, a sequence holds its running state and the last one that was cached."""


@dataclass(frozen=True, slots=True)
class _Spec:
    """A layer's cache: `page` bytes hold `block` tokens (all of a sequence if `block` is 0)."""

    page: int
    block: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class KvCache:
    """One GPU's pool: bytes of a block, and the groups of layers that each take blocks of their own.

    `per_token`: bytes of a token in all layers; `beyond_window`: in those that keep every token; `per_sequence`: bytes
    of linear attention's states.
    """

    block_bytes: int
    groups: tuple[_Spec, ...]
    per_token: int
    beyond_window: int
    per_sequence: int

    def blocks(self, context: int, batched_tokens: int) -> int:
        """The most blocks that a request of `context` tokens holds, with batches of `batched_tokens`."""
        in_flight = CONCURRENT_BATCHES * batched_tokens
        return sum(_blocks(group, context, in_flight) for group in self.groups)

    def nbytes(self, context: int, requests: int, batched_tokens: int) -> int:
        """Bytes for `requests` requests of `context` tokens each at the same time."""
        return (self.blocks(context, batched_tokens) * requests + 1) * self.block_bytes if self.groups else 0


def kv_cache(layers: tuple[Layer, ...], tensor_parallel: int, element_bytes: int) -> KvCache:
    """The pool of one of `tensor_parallel` GPUs, with keys and values of `element_bytes`."""
    kept = [layer for layer in layers if not layer.shared]
    costs = {layer: _token_bytes(layer, tensor_parallel, element_bytes) for layer in kept}
    states = [_state_bytes(layer, tensor_parallel) for layer in kept if layer.kind == "linear"]
    block = _block_tokens(costs, max(states, default=0))
    specs = [
        _Spec(_state_bytes(layer, tensor_parallel), 0)
        if layer.kind == "linear"
        else _Spec(block * costs[layer], block, layer.window)
        for layer in kept
    ]
    block_bytes, groups = _group(specs)
    return KvCache(
        block_bytes,
        groups,
        per_token=sum(costs[layer] for layer in kept),
        beyond_window=sum(costs[layer] for layer in kept if layer.kind == "full"),
        per_sequence=sum(states),
    )


def _token_bytes(layer: Layer, gpus: int, element_bytes: int) -> int:
    """Bytes of one token's keys and values in one layer; every GPU holds one head at least."""
    return 2 * max(1, layer.heads // gpus) * layer.head_dim * element_bytes if layer.heads else 0


def _state_bytes(layer: Layer, gpus: int) -> int:
    return (layer.conv_state * 2 + layer.ssm_state * layer.ssm_bytes) // gpus


def _block_tokens(costs: dict[Layer, int], state: int) -> int:
    """Tokens per block: 16, or next to linear attention enough for a page to hold one layer's state."""
    dearest = max((cost for layer, cost in costs.items() if layer.kind != "linear"), default=0)
    pages = -(-state // (BLOCK_TOKENS * dearest)) if dearest else 1
    return BLOCK_TOKENS * max(1, pages)


def _group(specs: list[_Spec]) -> tuple[int, tuple[_Spec, ...]]:
    """The bytes of a block, and the groups (`get_kv_cache_groups`)."""
    if not specs:
        return 0, ()
    if len({(spec.block, spec.window) for spec in specs}) == 1:  # pages may differ, the number of blocks does not
        return sum(spec.page for spec in specs), (specs[0],)
    page = max(spec.page for spec in specs)
    kinds = Counter(_stretch(spec, page) for spec in specs)
    fewest, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * fewest else fewest
    groups = [spec for spec, layers in kinds.items() for _ in range(-(-layers // size))]
    widest = max(-(-layers // -(-layers // size)) for layers in kinds.values())
    return widest * page, tuple(groups)


def _stretch(spec: _Spec, page: int) -> _Spec:
    """The spec with pages of `page` bytes: with longer blocks where that divides, else padded."""
    ratio = page // spec.page if spec.block and page % spec.page == 0 else 1
    return replace(spec, page=page, block=spec.block * ratio)


def _blocks(group: _Spec, context: int, in_flight: int) -> int:
    if not group.block:
        return MAMBA_STATES
    if group.window:
        return -(-min(group.window - 1 + in_flight, context) // group.block) + 1
    return -(-context // group.block)
