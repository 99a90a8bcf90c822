"""Estimate the memory that an engine needs on a GPU besides weights and KV cache.

Rotary tables follow from the config. The rest is estimated, and marked so wherever it is shown: vLLM measures it when
it starts, by one run over the largest batch it will ever make (`GPUModelRunner.profile_run`), and keeps it out of the
KV cache. The largest of three things counts, because each is freed before the next:

- one decoder layer over a whole batch: residual, norm, INT8 copy; gate and up, their product, its INT8 copy (or as much
  for a state's input, gate and output);
- the logits of all sequences that may run at once, in the model's dtype and in FP32, probabilities and noise;
- the vision tower over as many patches as fill a batch with image tokens.

Hidden states and per-layer embeddings of a batch stay beside them, and where there are experts, the two workspaces of
their kernel, which vLLM sizes for the largest batch, all at once, and never frees
(`fused_moe/experts/triton_moe.py`, `workspace_shapes`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from w8a8.errors import NoConfigError
from w8a8.formats.detect import section
from w8a8.machine import Gpu
from w8a8.memory.model import LARGEST, Model
from w8a8.reading import UnfitError, convert

CONTEXT_BYTES = 600 * 2**20
"""Estimate: the CUDA or HIP context, loaded kernels, BLAS workspaces."""

COMMUNICATION_BYTES = 500 * 2**20
"""Estimate: NCCL's or RCCL's buffers, where there is more than one GPU."""

GRAPH_BYTES = 800 * 2**20
"""Estimate: recorded CUDA or HIP graphs of some fifty batch sizes, which vLLM takes off the KV cache too."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest batch an engine makes: tokens in one step, sequences running at once."""

    tokens: int
    sequences: int


def largest_batch(model: Model, gpu: Gpu, context: int, *, text_only: bool) -> Batch:
    """The largest batch of `vllm serve` by default on such a GPU (`EngineArgs.get_batch_defaults`)."""
    if gpu.memory >= 160 * 2**30:
        tokens, sequences = 16384, 1024
    elif gpu.memory >= 70 * 2**30 and not _is_a100(gpu):
        tokens, sequences = 8192, 1024
    else:
        tokens, sequences = 2048, 256
    if model.vision and not text_only and model.text.get("use_bidirectional_attention") == "vision":
        tokens = max(tokens, model.table.video_tokens)
    tokens = min(tokens, sequences * context)
    return Batch(tokens, min(sequences, tokens))


def activation_bytes(model: Model, gpus: int, batch: Batch, *, text_only: bool) -> int:
    """Bytes of the largest transient, on one of `gpus` GPUs; an estimate."""
    widest = max([model.intermediate, *(layer.state.channels for layer in model.layers if layer.state)])
    layer = batch.tokens * (6 * model.hidden + 7 * -(-widest // gpus))
    logits = batch.sequences * model.vocabulary * (2 + 2 * (gpus > 1) + 3 * 4)
    vision = 0 if text_only or not model.vision else batch.tokens * _patch_bytes(model)
    per_layer = _size(model.text, "hidden_size_per_layer_input", 0) * len(model.layers)
    kept = 2 * batch.tokens * (model.hidden + per_layer) + expert_bytes(model, gpus, batch.tokens)
    return max(layer, logits, vision) + kept


def expert_bytes(model: Model, gpus: int, tokens: int) -> int:
    """Bytes of the workspaces of routed experts: for each token and each of its experts, the inputs of the second
    matrix, the outputs of either, in 2 bytes; and both inputs in INT8."""
    if not model.experts:
        return 0
    width, chosen = -(-model.experts.width // gpus), model.experts.per_token
    workspaces = 2 * (max(width, model.hidden) + max(2 * width, model.hidden))
    return tokens * (chosen * (workspaces + width) + model.hidden)


def engine_bytes(gpus: int) -> int:
    """Bytes of the engine itself on a GPU; an estimate."""
    return CONTEXT_BYTES + GRAPH_BYTES + (COMMUNICATION_BYTES if gpus > 1 else 0)


def rotary_bytes(model: Model) -> int:
    """Bytes of the cosine and sine tables, one for each kind of layer, `[positions, rotary dimensions]` in 2 bytes.

    Raises `NoConfigError` for rotary parameters of types that they cannot have.
    """
    table = model.table
    silent = not any(key.startswith(("rope", "rotary")) for key in model.text)
    if not table.rotary_tables or (silent and any(layer.state for layer in model.layers)):
        return 0
    if any(model.text.get(key, True) not in (True, "rope") for key in table.rotary_only_if):
        return 0
    ropes = {sliding: _rope(model.text, sliding=sliding) for sliding in (False, True)}
    kinds = {(layer.rotary, layer.kind == "sliding") for layer in model.layers if layer.rotary}
    if ropes[False] == ropes[True]:
        kinds = {(head_dim, False) for head_dim, _ in kinds}
    try:
        elements = sum(_table_size(convert(ropes[kind], _Rope), width, model.max_context) for width, kind in kinds)
        return elements * table.rotary_bytes
    except UnfitError as error:
        raise NoConfigError(
            f"{model.checkpoint.path}: config.json has rotary parameters of a wrong type ({error})"
        ) from error


def _rope(text: Mapping[str, Any], *, sliding: bool) -> Mapping[str, Any]:
    """The rotary parameters of a kind of layer, in the spelling of transformers 5 or of older versions."""
    nested = section(text, "rope_parameters", "sliding_attention" if sliding else "full_attention")
    if nested:
        return nested
    if sliding and "rope_local_base_freq" in text:
        return {}
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")
    return {"partial_rotary_factor": text.get("partial_rotary_factor"), **rope}


@dataclass(frozen=True, slots=True)
class _Rope:
    """What of them decides a table's size; `type` is `rope_type` in the spelling of older versions."""

    rope_type: str | None = None
    type: str | None = None
    factor: float | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: float | None = None


def _table_size(rope: _Rope, head_dim: int, positions: int) -> int:
    kind = rope.rope_type or rope.type
    if rope.partial_rotary_factor and 0 < rope.partial_rotary_factor < 1 and kind != "proportional":
        head_dim = int(head_dim * rope.partial_rotary_factor)
    original = rope.original_max_position_embeddings or 0
    if kind == "yarn" and 0 < original < LARGEST:
        positions = int(original)
    if kind in {"linear", "yarn"} and rope.factor and 1 <= rope.factor <= 1024:
        positions = int(positions * rope.factor)
    return positions * head_dim


def _patch_bytes(model: Model) -> int:
    """Bytes that the vision tower needs for the patches of one token."""
    vision = section(model.checkpoint.config, "vision_config")
    hidden, intermediate = (_size(vision, key, default) for key, default in _VISION_DEFAULTS)
    merged = _size(vision, "pooling_kernel_size", _size(vision, "spatial_merge_size", 4))
    return merged**2 * (8 * hidden + 6 * intermediate)


_VISION_DEFAULTS = (("hidden_size", 1152), ("intermediate_size", 4304))


def _size(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key)
    return value if type(value) is int and 0 < value < 2**24 else default


def _is_a100(gpu: Gpu) -> bool:
    return gpu.arch == "sm_80" or "a100" in gpu.name.lower()
