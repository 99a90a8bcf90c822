"""Small random decoders of every architecture that has groups, and inputs with outliers for their layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

SIZES: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]
CONFIGS: Mapping[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, layer_types=LAYER_TYPES),
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **SIZES,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        layer_types=LAYER_TYPES,
    ),
}
KNOWN = tuple(CONFIGS)


def model(kind: str, seed: int = 0) -> Any:
    """A random float32 model; norms and biases are random too."""
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
                assert "norm" in name or "bias" in name
    return made.requires_grad_(requires_grad=False)


def config_of(made: Any) -> dict[str, Any]:
    """What its config.json says."""
    found: dict[str, Any] = made.config.to_dict()
    return found


@dataclass(frozen=True)
class Batch:
    """Inputs of a layer."""

    hidden: Tensor
    reference: Tensor
    kwargs: dict[str, Any] = field(repr=False)
    held_out: bool = False


def batches(made: Any, number: int, *, count: int = 8, tokens: int = 48, outliers: float = 30.0) -> list[Batch]:
    """Random inputs of layer `number`, every fourth held out; a few channels are `outliers` times as large."""
    generator = torch.Generator().manual_seed(number)
    seen: dict[str, Any] = {}

    def keep(_module: Any, _arguments: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    hook = made.base_model.layers[number].register_forward_pre_hook(keep, with_kwargs=True)
    made(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    hook.remove()
    loud = torch.ones(made.config.hidden_size)
    loud[::11] = outliers
    states = [torch.randn(1, tokens, len(loud), generator=generator) * loud for _ in range(count)]
    return [Batch(each, each, seen, n % 4 == 3) for n, each in enumerate(states)]
