"""Count the bytes of weights that one GPU holds under vLLM's tensor parallelism.

From the source of vLLM 0.32 (`model_executor/layers/linear.py`, `vocab_parallel_embedding.py`, `models/*.py`), and
tested against what its models allocate (`tests/memory/test_against_vllm.py`):

- projections into heads or into the MLP are split by rows, with their scales and biases; those back are split by
  columns, and every GPU keeps all their scales and the bias;
- key and value heads are copied where there are more GPUs than heads;
- a layer whose keys serve as values (no `v_proj`) gets a `v_proj` all the same, a copy of its `k_proj`;
- embeddings and `lm_head` are split by vocabulary, padded to a multiple of 64; a tied `lm_head` takes nothing;
- everything else is whole on every GPU: norms, routers, projectors. So is the vision tower of Gemma 4, which is
  transformers' own module; those of Gemma 3, Mistral 3 and Qwen3.5 are split like the decoder;
- not loaded at all: MTP heads, keys and values of layers that use another layer's cache, and with `--text-only` towers;
- weights that are not quantized take 2 bytes each, even if the file has 4; the decays of linear attention take 4.
"""

import re
from collections.abc import Iterable

from w8a8.checkpoint import TensorSpec
from w8a8.memory.model import Model, layer_of

VOCABULARY_PADDING = 64

_TOWERS = frozenset({"vision tower", "audio tower", "projector"})
_SUFFIX = re.compile(r"\.(weight|bias|weight_scale)$")


def weights_per_gpu(model: Model, tensor_parallel: int, *, text_only: bool = False) -> int:
    """Bytes of parameters on the GPU that holds the most (the first)."""
    return sum(_share(model, tensor, tensor_parallel) for tensor in loaded(model, text_only=text_only))


def loaded(model: Model, *, text_only: bool) -> Iterable[TensorSpec]:
    """The tensors that an engine loads; a `k_proj` that is also loaded as `v_proj` comes twice."""
    tensors, names = model.checkpoint.tensors, model.table.attention
    tied = model.text.get("tie_word_embeddings", model.checkpoint.config.get("tie_word_embeddings")) is True
    for tensor in tensors.values():
        part, place = model.components[tensor.name], layer_of(tensor.name)
        leaf = _leaf(tensor.name)
        if part == "mtp head" or (text_only and part in _TOWERS) or (leaf == "lm_head" and tied):
            continue
        if part not in _TOWERS and place is not None:
            layer = model.layers[place[0]] if place[0] < len(model.layers) else None
            if layer is not None and layer.shared and leaf in {names.key, names.value, names.key_norm}:
                continue
            if leaf == names.key and tensor.name.replace(f".{names.key}.", f".{names.value}.") not in tensors:
                yield tensor
        yield tensor


def _share(model: Model, tensor: TensorSpec, gpus: int) -> int:
    """The bytes of `tensor` on the first GPU."""
    table, leaf, part = model.table, _leaf(tensor.name), model.components[tensor.name]
    nbytes = tensor.nbytes
    if leaf in table.in_fp32:
        nbytes = tensor.numel * 4
    elif tensor.dtype in {"F32", "F64"} and not tensor.name.endswith("_scale"):
        nbytes = tensor.numel * 2
    kv = {table.attention.key, table.attention.value}
    if gpus == 1 and leaf not in table.by_vocabulary:
        return nbytes
    if part == "router" or (part in _TOWERS and not table.split_towers):
        return nbytes
    if leaf in table.by_vocabulary and tensor.shape:
        rows = -(-tensor.shape[0] // VOCABULARY_PADDING) * VOCABULARY_PADDING
        return nbytes // max(tensor.shape[0], 1) * -(-rows // gpus)
    if part == "experts":
        return -(-nbytes // gpus)
    if leaf in kv and part not in _TOWERS and (place := layer_of(tensor.name)):
        return nbytes // min(gpus, _kv_heads(model, place[0]))
    if leaf in table.by_rows:
        return _fused_share(model, leaf, part, nbytes, gpus)
    if leaf in table.by_columns and len(tensor.shape) == 2 and not tensor.name.endswith("_scale"):
        return -(-nbytes // gpus)
    return nbytes


def _fused_share(model: Model, leaf: str, part: str, nbytes: int, gpus: int) -> int:
    """The bytes of a tensor split by rows; of a fused projection's KV heads, each GPU has one at least."""
    if leaf == model.table.attention.fused and part not in _TOWERS:
        layer = model.layers[0]
        heads = model.heads + 2 * layer.heads
        return nbytes // heads * (-(-model.heads // gpus) + 2 * max(1, layer.heads // gpus))
    return -(-nbytes // gpus)


def _kv_heads(model: Model, index: int) -> int:
    layer = model.layers[index] if index < len(model.layers) else None
    return max(1, layer.heads) if layer else 1


def _leaf(name: str) -> str:
    """The last part of a module's name, without a `linear` wrapper (`q_proj.linear.weight`)."""
    return _SUFFIX.sub("", name).removesuffix(".linear").rpartition(".")[2]
