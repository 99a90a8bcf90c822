"""Count the RAM that the embedded engine needs to run a checkpoint on the CPU.

transformers holds INT8 weights with FP32 scales, the rest in the dtype that is computed in, a `DynamicCache` of keys
and values, or of latents, in that dtype (a sliding window keeps its window), and works on a whole prompt at once, for
which it makes keys and values of all heads from the latents of one layer. What a wider dtype adds is counted here.
"""

from pathlib import Path

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.checkpoint.finding import open_headers
from w8a8.memory.layers import Layer
from w8a8.memory.model import Model
from w8a8.memory.weights import weights_per_gpu
from w8a8.sources.view import LogicalTensor

PROCESS_BYTES = 1400 * 2**20
"""Estimate: Python with torch, transformers and the server loaded, and a process that tries tokenizers' patterns."""


HALVES = {"BF16", "F16"}
"""Dtypes of 2 bytes."""


def ram_needed(checkpoint: str | Path | Checkpoint, context: int, concurrency: int = 1, dtype: str = "auto") -> int:
    """Bytes of RAM that the embedded engine needs for `concurrency` requests of `context` tokens; an estimate.

    `dtype` is that of the option: "auto" is the stored one. Raises the errors of opening a checkpoint.
    """
    model = _model(checkpoint)
    context, element = min(context, model.max_context), element_bytes(model, dtype)
    cache = concurrency * sum(_cache_bytes(layer, context, element) for layer in model.layers)
    return cache + _besides_cache(model, context, concurrency, element)


def ram_besides_cache(checkpoint: str | Path | Checkpoint, tokens: int, concurrency: int, dtype: str = "auto") -> int:
    """Bytes of RAM for all but caches, where the engine reads `tokens` tokens of prompts at once; an estimate.

    `dtype` as above. Raises the errors of opening a checkpoint.
    """
    model = _model(checkpoint)
    return _besides_cache(model, tokens, concurrency, element_bytes(model, dtype))


def element_bytes(model: Model, dtype: str) -> int:
    """Bytes of a number that transformers computes with, keys and values among them: 4 or 2.

    For "auto" that is by the dtype which the config declares, else by that of most bytes that are not INT8.
    """
    configs = (model.checkpoint.config, model.text)
    declared = (config.get(key) for config in configs for key in ("dtype", "torch_dtype"))
    named = str(next(filter(None, declared), "")) if dtype == "auto" else dtype
    if named:
        return 4 if "float32" in named else 2
    tensors = model.checkpoint.tensors.values()
    wide, half = (sum(t.nbytes for t in tensors if t.dtype in kinds) for kinds in ({"F32"}, HALVES))
    return 4 if wide > half else 2


def held(tensor: TensorSpec | LogicalTensor, element: int) -> int:
    """Bytes that a stored tensor takes in a model that computes with numbers of `element` bytes, 4 or 2."""
    return tensor.numel * 4 if element == 4 and tensor.dtype in HALVES else tensor.nbytes


def _besides_cache(model: Model, tokens: int, concurrency: int, element: int) -> int:
    wide = model.intermediate + (model.experts.width * model.experts.per_token if model.experts else 0)
    working = tokens * (6 * model.hidden + 7 * wide + 2 * _from_latent(model)) * element // 2
    logits = concurrency * (4 + element) * model.vocabulary
    widened = sum(held(tensor, element) - tensor.nbytes for tensor in model.checkpoint.tensors.values())
    return PROCESS_BYTES + weights_per_gpu(model, 1) + widened + working + logits


def _model(checkpoint: str | Path | Checkpoint) -> Model:
    return Model.read(checkpoint if isinstance(checkpoint, Checkpoint) else open_headers(checkpoint))


def _from_latent(model: Model) -> int:
    """Keys and values, in elements, that a layer makes of a token's latent; 0 without latents."""
    ending = f".{model.table.latent.up}.weight"
    rows = max((tensor.shape[0] for tensor in model.owners.values() if tensor.name.endswith(ending)), default=0)
    return rows + model.heads * max((layer.rotary for layer in model.layers), default=0) if rows else 0


def _cache_bytes(layer: Layer, context: int, element: int) -> int:
    tokens = min(context, layer.window or context)
    return tokens * layer.token_bytes(1, element) + (layer.state.nbytes(1) if layer.state else 0)
