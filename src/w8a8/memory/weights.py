"""Count the bytes of weights that one GPU holds under vLLM's tensor parallelism.

From the source of vLLM 0.32 (`model_executor/layers/linear.py`, `vocab_parallel_embedding.py`, `fused_moe/`, `mamba/`,
`models/*.py`), and tested against what its models allocate (`tests/memory/test_against_vllm.py`):

- projections into heads or into the MLP are split by rows, with their scales and biases; those back are split by
  columns, and every GPU keeps their bias and their scales, but for scales that have columns themselves;
- so is every routed or shared expert: each GPU holds a part of all of them (no expert parallelism); routers are whole;
- key and value heads are copied where there are more GPUs than heads, and so are the groups of a Mamba-2 layer;
- a layer whose keys serve as values (no `v_proj`) gets a `v_proj` all the same, a copy of its `k_proj`;
- latent attention (MLA) holds what leads to the latent on every GPU, and splits what leads back; where the latter is
  quantized, vLLM keeps a copy of it in 2 bytes an element (`MLAAttention.process_weights_after_loading`);
- embeddings and `lm_head` are split by vocabulary, padded to a multiple of 64; a tied `lm_head` takes nothing;
- everything else is whole on every GPU: norms, projectors. So is the vision tower of Gemma 4, which is transformers'
  own module; those of Gemma 3, Mistral 3 and Qwen3.5 are split like the decoder;
- not loaded at all: MTP heads, keys and values of layers that use another layer's cache, and with `--text-only` towers;
- weights that are not quantized take 2 bytes each, even if the file has 4; decays of states and routers' biases take 4.
"""

import re
from collections.abc import Iterable
from typing import Any

from w8a8.checkpoint import TensorSpec
from w8a8.memory.layers import Layer
from w8a8.memory.model import Model, kind_of, layer_of
from w8a8.sources.view import LogicalTensor

VOCABULARY_PADDING = 64
UNQUANTIZED = frozenset({"BF16", "F16", "F32", "F64"})

_TOWERS = frozenset({"vision tower", "audio tower", "projector"})
_SUFFIX = re.compile(r"(\.(weight|bias|weight_scale|weight_scale_inv|weight_packed)|(?<=_proj)_(bias|blocks|scales))$")
_SCALE = re.compile(r"_(scale|scales|scale_inv)$")
_INNER_NORM = (".mamba.norm.weight", ".mixer.norm.weight")
"""Ends of the names of norms inside a Mamba-2 layer, which are as wide as its convolution's values."""


def weights_per_gpu(model: Model, tensor_parallel: int, *, text_only: bool = False) -> int:
    """Bytes of parameters on the GPU that holds the most (the first)."""
    shares: dict[tuple[Any, ...], int] = {}
    held = 0
    for tensor in loaded(model, text_only=text_only):
        layer = _layer(model, tensor)
        alike = (kind_of(tensor.name), tensor.dtype, tensor.shape, layer)
        if alike not in shares:
            shares[alike] = _share(model, tensor, layer, tensor_parallel)
        held += shares[alike]
    return held + _copies(model, tensor_parallel)


def _copies(model: Model, gpus: int) -> int:
    """Bytes of the copies in 2 bytes that vLLM keeps of quantized projections from latents to heads."""
    up = f".{model.table.latent.up}.weight"
    return sum(
        2 * owner.numel // gpus
        for name, owner in model.owners.items()
        if owner.name.endswith(up) and name == owner.stored.name and model.components[name] != "mtp head"
        if not owner.plain or owner.dtype not in UNQUANTIZED
    )


def loaded(model: Model, *, text_only: bool) -> Iterable[TensorSpec]:
    """The tensors that an engine loads; a `k_proj` that is also loaded as `v_proj` comes twice."""
    tensors, names = model.checkpoint.tensors, model.table.attention
    tied = model.text.get("tie_word_embeddings", model.checkpoint.config.get("tie_word_embeddings")) is True
    for tensor in tensors.values():
        part, leaf, layer = model.components[tensor.name], _leaf(model.owners[tensor.name].name), _layer(model, tensor)
        if part == "mtp head" or (text_only and part in _TOWERS) or (leaf == "lm_head" and tied):
            continue
        if layer is not None:
            if layer.shared and leaf in {names.key, names.value, names.key_norm}:
                continue
            if leaf == names.key and tensor.name.replace(f".{names.key}.", f".{names.value}.") not in tensors:
                yield tensor
        yield tensor


def _layer(model: Model, tensor: TensorSpec) -> Layer | None:
    """The decoder layer that a tensor is in."""
    place = None if model.components[tensor.name] in _TOWERS else layer_of(model.owners[tensor.name].name)
    return model.layers[place[0]] if place and place[0] < len(model.layers) else None


def _share(model: Model, tensor: TensorSpec, layer: Layer | None, gpus: int) -> int:
    """The bytes of `tensor`, which is in `layer`, on the first GPU."""
    table, owner, part = model.table, model.owners[tensor.name], model.components[tensor.name]
    leaf, state, nbytes = _leaf(owner.name), layer.state if layer else None, tensor.nbytes
    if leaf in table.in_fp32:
        nbytes = tensor.numel * 4
    elif tensor.dtype in {"F32", "F64"} and owner.plain and not _SCALE.search(tensor.name):
        nbytes = tensor.numel * 2
    if gpus == 1 and leaf not in table.by_vocabulary:
        return nbytes
    if tensor.name in model.routed:
        return _split(tensor, owner, nbytes, gpus, columns=leaf in table.by_columns)
    if part == "router" or (part in _TOWERS and not table.split_towers):
        return nbytes
    if leaf in table.by_vocabulary and tensor.shape:
        rows = -(-tensor.shape[0] // VOCABULARY_PADDING) * VOCABULARY_PADDING
        return nbytes // max(tensor.shape[0], 1) * -(-rows // gpus)
    if leaf in {table.attention.key, table.attention.value} and layer and layer.heads:
        return nbytes // min(gpus, layer.heads)
    if leaf in {"in_proj", "conv1d"} and state and state.groups and tensor.shape:
        copied = state.groups_on(gpus) - state.groups
        return nbytes // max(tensor.shape[0], 1) * (tensor.shape[0] + copied * state.per_group) // gpus
    if state and state.groups and owner.name.endswith(_INNER_NORM):
        return -(-nbytes // gpus)
    if leaf in table.by_rows:
        return _fused_share(model, leaf, part, nbytes, gpus)
    if leaf in table.by_columns and len(tensor.shape) <= 2:
        return _split(tensor, owner, nbytes, gpus, columns=True)
    return nbytes


def _split(tensor: TensorSpec, owner: LogicalTensor, nbytes: int, gpus: int, *, columns: bool) -> int:
    """The share of a tensor split by rows or `columns`; what has one number for each row, or all, is whole."""
    flat = len(tensor.shape) < 2 or tensor.name.endswith("bias") or tensor.shape[-1] == 1
    flat = flat or (tensor.name != owner.stored.name and tensor.numel in {1, owner.shape[0]})
    return nbytes if columns and flat else -(-nbytes // gpus)


def _fused_share(model: Model, leaf: str, part: str, nbytes: int, gpus: int) -> int:
    """The bytes of a tensor split by rows; of a fused projection's KV heads, each GPU has one at least."""
    if leaf in model.table.attention.fused and part not in _TOWERS:
        layer = model.layers[0]
        heads = model.heads + 2 * layer.heads
        return nbytes // heads * (-(-model.heads // gpus) + 2 * max(1, layer.heads // gpus))
    return -(-nbytes // gpus)


def _leaf(name: str) -> str:
    """The last part of a module's name, without a `linear` wrapper (`q_proj.linear.weight`)."""
    return _SUFFIX.sub("", name).removesuffix(".linear").rpartition(".")[2]
