"""Judge a tensor by its name: which component it belongs to, and whether it is quantized.

`Rules.for_config` picks the architecture's table by the config's `model_type`; `Rules.judge` asks its patterns. Nothing
here looks at a weight.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from itertools import chain
from typing import Any, Self

from w8a8.checkpoint import Shaped
from w8a8.plan.architectures import GENERIC, architecture_of, text_section

QUANTIZABLE = frozenset({"BF16", "F16", "F32"})

NEVER = {
    "lm_head": "vLLM keeps output layers in the model's dtype and could not load one in INT8",
    "router": "vLLM keeps routers in the model's dtype and could not load one in INT8",
}
"""Component -> why `--include` refuses it, for any architecture and format; checked against vLLM 0.32."""

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
_EXPERT = re.compile(r"(?P<unit>.*\bexperts)\.\d+\..*")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The rules' verdict on a tensor: its component, whether it is quantized, and the reason."""

    component: str
    quantize: bool
    reason: str


@dataclass(frozen=True)
class Rules:
    """One architecture's rules. `known` is false where the generic table had to do.

    `never` says why components are kept that no engine takes in INT8, `reasons` why others are kept by default.
    `layers` is the number of decoder layers by the config, if it says it: layers behind them are MTP heads.
    """

    architecture: str
    known: bool
    keep: Mapping[str, re.Pattern[str]]
    never: Mapping[str, str]
    reasons: Mapping[str, str]
    text: re.Pattern[str]
    quantize: Mapping[str, re.Pattern[str]]
    fused: tuple[tuple[str, ...], ...]
    whole: bool
    spellings: tuple[str, ...]
    layers: int | None = None
    _found: dict[str, tuple[str, bool]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def for_config(cls, config: Mapping[str, Any]) -> Self:
        """The rules for a model's config.json, by its `model_type`."""
        table = architecture_of(config)
        layers = text_section(config).get("num_hidden_layers")
        return cls(
            architecture=str(config.get("model_type", "")) or "unknown",
            known=table.name != GENERIC,
            keep={component: _compile(patterns) for component, patterns in table.keep.items()},
            never={**NEVER, **table.never},
            reasons={**table.never, **table.reasons},
            text=_compile(table.text or ("",)),
            quantize={component: _compile(patterns) for component, patterns in table.quantize.items()},
            fused=table.fused,
            whole=table.whole,
            spellings=table.spellings,
            layers=layers if isinstance(layers, int) else None,
        )

    def judge(self, tensor: Shaped) -> Verdict:
        """Judge `tensor`."""
        module = module_name(tensor.name)
        component, quantize = self._component(module)
        if component not in self.keep and self._behind(module):
            component, quantize = "mtp head", False
        if quantize:
            return self._judge_linear(tensor, component)
        otherwise = "no rule names it" if component == "other" else f"kept in {tensor.dtype}"
        reason = self.reasons.get(component, otherwise) if len(tensor.shape) > 1 else otherwise
        return Verdict(component, quantize=False, reason=reason)

    def _component(self, module: str) -> tuple[str, bool]:
        """The component of a module and whether its weight is to be quantized; looked up once for all layers."""
        name = _NUMBER.sub(".0", f".{module}")
        if name not in self._found:
            keep = {part: pattern for part, pattern in self.keep.items() if pattern.fullmatch(name)}
            if self.text.fullmatch(name):
                keep.pop("encoder", None)
            of_keep = ((component, False) for component in keep)
            to_quantize = ((component, True) for component, pattern in self.quantize.items() if pattern.fullmatch(name))
            self._found[name] = next(chain(of_keep, to_quantize), ("other", False))
        return self._found[name]

    def _behind(self, module: str) -> bool:
        """Whether a module lies in a layer behind the last one that config.json counts."""
        layer = _LAYER.search(module)
        return self.layers is not None and layer is not None and int(layer[1]) >= self.layers

    def _judge_linear(self, tensor: Shaped, component: str) -> Verdict:
        if not tensor.name.endswith(".weight"):
            return Verdict(component, quantize=False, reason="not a weight")
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            return Verdict(component, quantize=False, reason=f"not a matrix: {list(tensor.shape)}")
        if tensor.dtype not in QUANTIZABLE:
            return Verdict(component, quantize=False, reason=wrong_dtype(tensor))
        return Verdict(component, quantize=True, reason="decoder linear")

    def group_of(self, module: str) -> tuple[str, ...]:
        """The modules that engines fuse with `module`, itself included; empty for an expert, or if it stands alone."""
        if experts_of(module):
            return ()
        parent, _, leaf = module.rpartition(".")
        group = next((group for group in self.fused if leaf in group), ())
        return tuple(f"{parent}.{member}" if parent else member for member in group)

    def unit_of(self, module: str) -> str:
        """A name for all that engines load as one with `module`: the experts of a layer, a fused group, or itself."""
        return experts_of(module) or ", ".join(self.group_of(module)) or module


def wrong_dtype(tensor: Shaped) -> str:
    """The reason that keeps a linear layer whose dtype is none of `QUANTIZABLE`."""
    return f"{tensor.dtype} is not a dtype to quantize from"


def module_name(tensor_name: str) -> str:
    """The module a tensor belongs to: its name without the last part (`weight`, `bias`)."""
    for ending in (".weight", ".bias"):
        if tensor_name.endswith(ending):
            return tensor_name.removesuffix(ending)
    return tensor_name


def experts_of(module: str) -> str | None:
    """The name of the experts that `module` is one of, `model.layers.0.mlp.experts`; None where it is no expert."""
    expert = _EXPERT.fullmatch(module)
    return expert["unit"] if expert else None


def scale_name(tensor_name: str) -> str:
    """The name of the scale that belongs to a quantized weight; the same in all formats."""
    return f"{module_name(tensor_name)}.weight_scale"


def is_linear(tensor: Shaped, component: str) -> bool:
    """Whether engines build a linear layer for `tensor`: a matrix called `weight` that is not a table."""
    matrix = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    return matrix and component not in {"embeddings", "norms"}


def _compile(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(translate(pattern) for pattern in patterns))
