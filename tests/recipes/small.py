"""Small random decoders of every architecture that has groups, and inputs with outliers for their layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from w8a8.recipes import costs
from w8a8.recipes.batches import Batch
from w8a8.recipes.costs import Cost
from w8a8.recipes.groups import groups_of
from w8a8.runtime.streamed import states_of

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
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "glm4": lambda: transformers.Glm4Config(**SIZES, pad_token_id=0),
}
KNOWN = tuple(CONFIGS)
POST_NORMED = "olmo2"
"""The one in which no norm stands before q/k/v and gate/up, so that loud channels of the states stay loud."""


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


@dataclass(frozen=True, slots=True)
class CostedBatch(Batch):
    """Inputs of a layer, and the costs of errors in it, as if only the states that leave it mattered."""

    row_costs: Mapping[str, Tensor]


def row_costs(given: Sequence[CostedBatch]) -> dict[str, Tensor]:
    """The costs of errors in the outputs of linear layers, on average over all batches."""
    return {path: torch.stack([each.row_costs[path] for each in given]).mean(0) for path in given[0].row_costs}


def kwargs_of(made: Any, number: int, ids: Tensor) -> dict[str, Any]:
    """What layer `number` is called with when the model reads `ids`; its states as `hidden_states`."""
    seen: dict[str, Any] = {}

    def keep(_module: Any, arguments: Any, kwargs: dict[str, Any]) -> None:
        seen.update({"hidden_states": arguments[0], **kwargs} if arguments else kwargs)

    hook = made.base_model.layers[number].register_forward_pre_hook(keep, with_kwargs=True)
    with hook:
        made(ids, use_cache=False)
    return seen


def batches(made: Any, number: int, *, count: int = 8, tokens: int = 48, outliers: float = 30.0) -> list[CostedBatch]:
    """Random inputs of layer `number`, every fourth held out; a few channels are `outliers` times as large."""
    generator = torch.Generator().manual_seed(number)
    seen = kwargs_of(made, number, torch.zeros(1, tokens, dtype=torch.long))
    del seen["hidden_states"]
    loud = torch.ones(made.config.hidden_size)
    loud[::11] = outliers
    states = [torch.randn(1, tokens, len(loud), generator=generator) * loud for _ in range(count)]
    layer = made.base_model.layers[number]
    paths = [path for group in groups_of(config_of(made), layer) for path in group.consumers]
    found = []
    for n, each in enumerate(states):
        size = states_of(layer(each, **seen)).norm(dim=-1, keepdim=True)
        direction = torch.randn(each.shape, generator=generator) / size
        _, gradients, _ = costs.backwards(layer, paths, each, seen, direction)
        measured = {path: Cost.of([gradient]) for path, gradient in gradients.items()}
        tokens_, rows = ({path: getattr(cost, part) for path, cost in measured.items()} for part in ("token", "row"))
        found.append(CostedBatch(each, seen, n % 4 == 3, tokens_, rows))
    return found
