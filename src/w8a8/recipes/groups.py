"""Which activations of a decoder layer can be rescaled without changing what the layer computes.

A group is some linear layers that read the same activations, and the module that makes these: dividing a channel of
the producer's output and multiplying the consumers' columns by the same number changes nothing in real arithmetic.

    norm    input_layernorm -> q, k, v     pre-MLP norm -> gate, up     the norm's weight is divided
    linear  up_proj -> down_proj           act(gate) * up is linear in up: up's rows are divided
    value   v_proj -> o_proj               attention is linear in v: v's rows are divided

A key-value head's channels reach `o_proj` once for every query head that shares it. Where values are normalised
(Gemma 4), are keys too, or are handed on to other layers, o_proj has no producer: its weight can be rounded better, but
its inputs stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
GEMMA_LIKE = frozenset({"gemma3", "gemma3_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"})
Kind = Literal["norm", "linear", "value"]


@dataclass(frozen=True, slots=True)
class Group:
    """Consumers of the same activations, and their producer, if it can be rescaled; paths inside the layer.

    `offset` is what the producing norm adds to its weight (Gemma 3: 1), `head_dim` the size of a head for "value".
    """

    name: str
    producer: str | None
    kind: Kind
    consumers: tuple[str, ...]
    offset: float = 0.0
    head_dim: int = 0


def groups_of(config: Mapping[str, Any], layer: nn.Module) -> tuple[Group, ...]:
    """The groups of a decoder layer in the order they run, by the `model_type` in its model's config.json.

    No groups for an architecture that is not known: its layers are rounded to nearest.
    """
    model_type = config.get("model_type")
    if model_type not in LLAMA_LIKE | GEMMA_LIKE:
        return ()
    before_mlp = "pre_feedforward_layernorm" if model_type in GEMMA_LIKE else "post_attention_layernorm"
    offset = 1.0 if model_type in {"gemma3", "gemma3_text"} else 0.0
    qkv = tuple(f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj") if _has(layer, f"self_attn.{leaf}"))
    return (
        Group("q/k/v", "input_layernorm", "norm", qkv, offset),
        _value_group(layer),
        Group("gate/up", before_mlp, "norm", ("mlp.gate_proj", "mlp.up_proj"), offset),
        Group("down", "mlp.up_proj", "linear", ("mlp.down_proj",)),
    )


def _value_group(layer: nn.Module) -> Group:
    attention = layer.get_submodule("self_attn")
    shared = getattr(attention, "store_full_length_kv", False) or getattr(attention, "is_kv_shared_layer", False)
    exact = _has(layer, "self_attn.v_proj") and not _has(layer, "self_attn.v_norm") and not shared
    return Group("o", "self_attn.v_proj" if exact else None, "value", ("self_attn.o_proj",), 0.0, attention.head_dim)


def _has(layer: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return isinstance(getattr(layer.get_submodule(parent), leaf, None), nn.Module)
