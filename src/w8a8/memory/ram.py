"""Count the RAM that the embedded engine needs to run a checkpoint on the CPU.

transformers holds the weights as stored (INT8 with FP32 scales, the rest in 2 bytes), a `DynamicCache` of keys and
values, or of latents, in 2 bytes (a sliding window keeps its window), and works on a whole prompt at once, for which it
makes keys and values of all heads from the latents of one layer.
"""

from pathlib import Path

from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.finding import open_headers
from w8a8.memory.layers import Layer
from w8a8.memory.model import Model
from w8a8.memory.weights import weights_per_gpu

PROCESS_BYTES = 1000 * 2**20
"""Estimate: Python with torch, transformers and the server loaded."""


def ram_needed(checkpoint: str | Path | Checkpoint, context: int, concurrency: int = 1) -> int:
    """Bytes of RAM that the embedded engine needs for `concurrency` requests of `context` tokens; an estimate.

    Raises the errors of opening a checkpoint.
    """
    model = _model(checkpoint)
    context = min(context, model.max_context)
    cache = concurrency * sum(_cache_bytes(layer, context) for layer in model.layers)
    return cache + _besides_cache(model, context, concurrency)


def ram_besides_cache(checkpoint: str | Path | Checkpoint, tokens: int, concurrency: int) -> int:
    """Bytes of RAM for all but caches, where the engine reads `tokens` tokens of a prompt at once; an estimate.

    Raises the errors of opening a checkpoint.
    """
    return _besides_cache(_model(checkpoint), tokens, concurrency)


def _besides_cache(model: Model, tokens: int, concurrency: int) -> int:
    wide = model.intermediate + (model.experts.width * model.experts.per_token if model.experts else 0)
    working = tokens * (6 * model.hidden + 7 * wide + 2 * _from_latent(model)) + concurrency * 6 * model.vocabulary
    return PROCESS_BYTES + weights_per_gpu(model, 1) + working


def _model(checkpoint: str | Path | Checkpoint) -> Model:
    return Model.read(checkpoint if isinstance(checkpoint, Checkpoint) else open_headers(checkpoint))


def _from_latent(model: Model) -> int:
    """Keys and values, in elements, that a layer makes of a token's latent; 0 without latents."""
    ending = f".{model.table.latent.up}.weight"
    rows = max((tensor.shape[0] for tensor in model.owners.values() if tensor.name.endswith(ending)), default=0)
    return rows + model.heads * max((layer.rotary for layer in model.layers), default=0) if rows else 0


def _cache_bytes(layer: Layer, context: int) -> int:
    tokens = min(context, layer.window or context)
    return tokens * layer.token_bytes(1, 2) + (layer.state.nbytes(1) if layer.state else 0)
