"""Count the bytes of KV cache that a GPU needs, as vLLM 0.32 allocates it.

vLLM gives every request whole blocks out of one pool, and all blocks have the same number of bytes. Where layers differ
(sliding windows next to full attention, other head sizes, states of fixed size), it sorts them into groups of as many
layers as its scarcest kind has, gives the layers that are cheaper per token longer blocks, pads the rest, and each
group takes blocks of its own (`v1/core/kv_cache_utils.py`). A sliding-window layer keeps its window, what the batches
in flight may add to it, and one block because a window need not start with one (`SlidingWindowSpec`); a layer that
attends within chunks keeps a chunk and what is in flight; one block of the pool is never used. Next to states, a block
of attention is made so long that it holds a layer's state (`platforms/interface.py`, `_align_hybrid_block_size`).
"""

from collections import Counter
from dataclasses import dataclass, replace

from w8a8.memory.layers import Layer

BLOCK_TOKENS = 16
CONCURRENT_BATCHES = 2
"""With asynchronous scheduling, the default, one batch is prepared while another runs."""

LATENT_TOKENS = 128
"""Next to states, blocks of latents hold a multiple of so many tokens, which kernels need."""


@dataclass(frozen=True, slots=True)
class _Spec:
    """A layer's cache: `page` bytes hold `block` tokens; or (0) a state, of which a sequence has `copies`.

    `window` tokens are kept, in blocks that start anywhere or, `chunked`, where a chunk does.
    """

    page: int
    block: int
    window: int = 0
    chunked: bool = False
    copies: int = 0


@dataclass(frozen=True, slots=True)
class KvCache:
    """One GPU's pool: bytes of a block, and the groups of layers that each take blocks of their own.

    `per_token`: bytes of a token in all layers; `beyond_window`: in those that keep every token; `per_sequence`: bytes
    of all layers' states, one copy.
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
    costs = {layer: layer.token_bytes(tensor_parallel, element_bytes) for layer in layers}
    states = [layer.state for layer in layers if layer.state]
    pages = [state.nbytes(tensor_parallel) for state in states]
    step = LATENT_TOKENS if states and any(layer.kind == "latent" for layer in layers) else BLOCK_TOKENS
    block = _block_tokens(max(costs.values(), default=0), max(pages, default=0), step)
    block_bytes, groups = _group(
        [_tokens(layer, costs[layer], block) for layer in layers if costs[layer]]
        + [_Spec(page, 0, copies=state.copies) for state, page in zip(states, pages, strict=True)]
    )
    return KvCache(
        block_bytes,
        groups,
        per_token=sum(costs[layer] for layer in layers),
        beyond_window=sum(costs[layer] for layer in layers if not layer.window),
        per_sequence=sum(pages),
    )


def _tokens(layer: Layer, cost: int, block: int) -> _Spec:
    return _Spec(block * cost, block, layer.window, chunked=layer.kind == "chunked")


def _block_tokens(dearest: int, state: int, step: int) -> int:
    """Tokens per block: 16, or next to states enough for a page of the dearest layer to hold a state."""
    pages = -(-state // (step * dearest)) if dearest and state else 1
    return (step if state else BLOCK_TOKENS) * max(1, pages)


def _group(specs: list[_Spec]) -> tuple[int, tuple[_Spec, ...]]:
    """The bytes of a block, and the groups (`get_kv_cache_groups`)."""
    if not specs:
        return 0, ()
    if (
        len({(spec.block, spec.window, spec.copies) for spec in specs}) == 1
    ):  # pages may differ, the number of blocks does not
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
        return group.copies
    if group.window and not group.chunked:
        return -(-min(group.window - 1 + in_flight, context) // group.block) + 1
    return -(-min(group.window + in_flight if group.window else context, context) // group.block)
