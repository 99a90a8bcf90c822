"""Small checkpoints for tests, written without torch: tensors by name, as bit patterns or float32 values."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.checkpoint.header import write_header
from w8a8.formats.arithmetic import encode

Array = NDArray[Any]

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}


def tensor_bytes(values: Array, dtype: str) -> bytes:
    """The little-endian bytes of float32 `values` as a BF16, F16 or F32 tensor; integers are taken as they are."""
    return encode(values, dtype) if values.dtype == np.float32 else values.tobytes()


def write_shard(
    path: Path, tensors: Mapping[str, tuple[str, Array]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file of `name -> (dtype, array)` in the order given."""
    rows, chunks, position = [], [], 0
    for name, (dtype, values) in tensors.items():
        data = tensor_bytes(values, dtype)
        rows.append((name, dtype, values.shape, position, position + len(data)))
        chunks.append(data)
        position += len(data)
    path.write_bytes(write_header(rows, metadata or {"format": "pt"}) + b"".join(chunks))


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, tuple[str, Array]],
    *,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """Write a whole checkpoint: config.json, `shards` shards (dealt round) and, if more than one, an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or LLAMA))
    if shards == 1:
        write_shard(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        write_shard(folder / name, part)
        weight_map.update(dict.fromkeys(part, name))
    total = sum(len(tensor_bytes(values, dtype)) for dtype, values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llama_tensors(
    layers: int = 2, hidden: int = 64, intermediate: int = 96, dtype: str = "BF16", seed: int = 0
) -> dict[str, tuple[str, Array]]:
    """Random tensors of a small Llama: embeddings, lm_head, norms, attention, MLP."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> tuple[str, Array]:
        return dtype, rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05)

    tensors = {"model.embed_tokens.weight": normal(128, hidden), "lm_head.weight": normal(128, hidden)}
    for i in range(layers):
        base = f"model.layers.{i}"
        tensors[f"{base}.input_layernorm.weight"] = normal(hidden)
        tensors[f"{base}.post_attention_layernorm.weight"] = normal(hidden)
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{base}.self_attn.{leaf}.weight"] = normal(hidden, hidden)
        for leaf in ("gate_proj", "up_proj"):
            tensors[f"{base}.mlp.{leaf}.weight"] = normal(intermediate, hidden)
        tensors[f"{base}.mlp.down_proj.weight"] = normal(hidden, intermediate)
    return tensors


def read_tensor(checkpoint: Checkpoint, tensor: TensorSpec) -> bytes:
    """A tensor's bytes, read plainly."""
    return (checkpoint.path / tensor.shard).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
