"""Reads the scheme that a config.json declares, whoever wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from w8a8.formats.excludes import Excludes


@dataclass(frozen=True)
class Scheme:
    """A declared quantization: its method, a sentence, whether it is INT8 W8A8 PTPC, and the layers it leaves alone."""

    method: str
    summary: str
    w8a8: bool
    excludes: tuple[str, ...]

    def leaves_alone(self, module: str) -> bool:
        """Whether an engine would leave `module` unquantized. Raises `NoConfigError`, see `Excludes`."""
        return self._excluded.mean(module)

    @property
    def unusable(self) -> tuple[str, ...]:
        """The patterns among `excludes` that no engine can use."""
        return self._excluded.unusable

    @cached_property
    def _excluded(self) -> Excludes:
        return Excludes(self.excludes)


DECLARATIONS = ("quantization_config", "compression_config")
"""Keys under which engines look for the scheme."""

UNQUANTIZED = Scheme("none", "not quantized", w8a8=False, excludes=())


def detect(config: Mapping[str, Any]) -> Scheme:
    """Read the scheme a config declares; an unknown one is described, not guessed at."""
    quantization = declared(config)
    if quantization is None:
        return UNQUANTIZED
    method = str(quantization.get("quant_method", "unknown"))
    if method == "quark":
        return _quark(quantization)
    if method == "compressed-tensors":
        return _compressed_tensors(quantization)
    return Scheme(method, f"{method}, not INT8 W8A8", w8a8=False, excludes=())


def undeclared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the entries that declare a quantization, wherever engines look for them."""
    rest = {key: value for key, value in without_empty(config).items() if key not in DECLARATIONS}
    text = rest.get("text_config")
    return rest | ({"text_config": undeclared(text)} if isinstance(text, dict) else {})


def without_empty(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the entries that declare no quantization (null, `{}`), here and in every section: tools leave them behind.

    They mean nothing, yet an engine may take `{}` for a scheme that it does not know.
    """
    return {
        key: without_empty(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value or key not in DECLARATIONS
    }


def declared(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Find the quantization config in any of the places where engines look."""
    for place in (config, section(config, "text_config")):
        for key in DECLARATIONS:
            if place.get(key):
                return section(place, key)
    return None


def _quark(quantization: Mapping[str, Any]) -> Scheme:
    weight = section(quantization, "global_quant_config", "weight")
    inputs = section(quantization, "global_quant_config", "input_tensors")
    per_channel = (weight.get("dtype"), weight.get("qscheme"), weight.get("ch_axis")) == ("int8", "per_channel", 0)
    per_token = (inputs.get("dtype"), inputs.get("qscheme"), inputs.get("is_dynamic")) == ("int8", "per_channel", True)
    static = weight.get("is_dynamic") is False
    symmetric = weight.get("symmetric") is True and inputs.get("symmetric") is True
    uniform = not quantization.get("layer_quant_config") and not quantization.get("layer_type_quant_config")
    ptpc = per_channel and static and per_token and symmetric and uniform
    detail = f"{weight.get('dtype')} {weight.get('qscheme')} weights, {inputs.get('dtype') or 'unquantized'} inputs"
    summary = _PTPC if ptpc else detail if weight and uniform else _MIXED
    return Scheme("quark", f"quark, {summary}", ptpc, _strings(quantization.get("exclude")))


def _compressed_tensors(quantization: Mapping[str, Any]) -> Scheme:
    groups = quantization.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) and len(groups) == 1 else None
    weights, inputs = (
        section({"group": group}, "group", "weights"),
        section({"group": group}, "group", "input_activations"),
    )
    per_channel = (weights.get("num_bits"), weights.get("type"), weights.get("strategy")) == (8, "int", "channel")
    per_token = (inputs.get("num_bits"), inputs.get("type"), inputs.get("dynamic")) == (8, "int", True)
    static = weights.get("dynamic") is False
    symmetric = weights.get("symmetric") is True and inputs.get("symmetric") is True
    ptpc = per_channel and static and per_token and inputs.get("strategy") == "token" and symmetric
    detail = f"{quantization.get('format')}, {weights.get('num_bits')}-bit {weights.get('type')} weights"
    summary = _PTPC if ptpc else detail if weights else _MIXED
    return Scheme("compressed-tensors", f"compressed-tensors, {summary}", ptpc, _strings(quantization.get("ignore")))


_PTPC = "INT8 W8A8: weights per channel, activations per token and dynamic"
_MIXED = "not one scheme for all layers"


def section(values: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Get the object at a path of keys; empty where there is none."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(entry for entry in value if isinstance(entry, str)) if isinstance(value, list) else ()
