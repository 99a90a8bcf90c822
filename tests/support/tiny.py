"""Tiny random models of every architecture that transformers can make, by its own config and model classes."""

import dataclasses
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

DATA = tomllib.loads(Path(__file__).with_name("architectures.toml").read_text())
SEEDS, SIZES, TOWER, SPECIAL, OTHERS = (DATA[key] for key in ("seeds", "sizes", "tower", "architecture", "others"))
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
"""Lists of a config that say what each layer is."""

_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_IMAGE = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def model_types() -> tuple[str, ...]:
    """Every `model_type` with a decoder for text."""
    known = {*_CAUSAL, *_IMAGE}
    return tuple(sorted(known - {name for names in OTHERS.values() for name in names}))


def make_config(model_type: str) -> Any:
    """The config of a tiny model of this type."""
    return _config(CONFIG_MAPPING[model_type], SIZES, SPECIAL.get(model_type, {}))


def make_model(model_type: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A tiny model of this type with random weights."""
    transformers.set_seed(SEEDS.get(model_type, 0))
    config = make_config(model_type)
    mapping = _IMAGE if model_type in _IMAGE else _CAUSAL
    kind = mapping[model_type]
    model = getattr(transformers, kind if isinstance(kind, str) else kind[0])._from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, values in model.named_parameters():
            _fill(name, values)
    return model.eval()


def _config(kind: type[Any], sizes: Mapping[str, Any], special: Mapping[str, Any]) -> Any:
    """A config of class `kind`, with `sizes` for what it has and `special` on top; configs within it likewise."""
    default = kind()
    names = {field.name for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {key: size for key, size in sizes.items() if key in names}
    if sizes is SIZES:
        values |= _layers(default, names, special)
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        values["num_key_value_heads"] = values["num_attention_heads"]
    for key in kind.sub_configs:
        part = getattr(default, key, None)
        if part is not None or key in special:
            inner = SIZES if "text" in key or key.startswith("decoder") else TOWER
            values[key] = _config(type(part) if part else kind.sub_configs[key], inner, special.get(key, {}))
    values |= _tokens(default)
    values |= {key: value for key, value in special.items() if key not in kind.sub_configs}
    return kind(**values)


def _layers(default: Any, names: Collection[str], special: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of every kind that the architecture has, two at least."""
    lists = {key: list(dict.fromkeys(getattr(default, key) or ())) for key in PER_LAYER if key in names}
    lists = {key: kinds for key, kinds in lists.items() if kinds and key not in special}
    count = special.get("num_hidden_layers") or max([2, *map(len, lists.values())])
    found: dict[str, Any] = {key: [kinds[i % len(kinds)] for i in range(count)] for key, kinds in lists.items()}
    counts = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "decoder_layers")
    return found | {key: count for key in counts if key in names}


def _tokens(default: Any) -> dict[str, int]:
    """Special tokens at the end of the small vocabulary."""
    keys = [
        key for key, value in vars(default).items() if key.endswith(("token_id", "token_index")) and type(value) is int
    ]
    return {key: SIZES["vocab_size"] - 1 - i for i, key in enumerate(sorted(keys))}


def _fill(name: str, values: torch.Tensor) -> None:
    """Random weights of a size at which every layer matters; norms near what they are.

    Rows have one weight twice as large as the others, beside a zero: two neighbours' codes never add up to more than
    128 then, for which the sums of vLLM's kernel are exact on every CPU (`tests/engines/int8.py`). Rows are scaled by
    powers of two, so that a scale in a wrong place shows.
    """
    if values.ndim < 2:
        values.add_(torch.randn(values.shape).to(values) * 0.1)
        return
    columns = values.shape[-1]
    drawn = torch.rand(values.shape) - 0.5
    if columns >= 32:
        rows = drawn.view(-1, columns)
        place = torch.arange(len(rows)) % (columns // 2) * 2
        rows[torch.arange(len(rows)), place] = 1.0
        rows[torch.arange(len(rows)), place + 1] = 0.0
    row = torch.arange(values.shape[-2]).unsqueeze(1)
    values.copy_(drawn * 3 * columns**-0.5 * 2.0 ** ((row * 5 + row // 7) % 3 - 1))
