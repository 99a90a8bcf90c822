"""Judge a tensor by its name: which component it belongs to, and whether it is quantized.

`Rules.for_config` picks the architecture's table by the config's `model_type`; `Rules.judge` asks its patterns. Nothing
here looks at a weight.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any, Self

from w8a8.checkpoint import Shaped
from w8a8.plan.architectures import GENERIC, architecture_of

QUANTIZABLE = frozenset({"BF16", "F16", "F32"})

NEVER = {
    "lm_head": "vLLM keeps output layers in the model's dtype and could not load one in INT8",
    "router": "vLLM keeps routers in the model's dtype and could not load one in INT8",
}
"""Component -> why `--include` refuses it, for any format; checked against vLLM 0.32."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The rules' verdict on a tensor: its component, whether it is quantized, and the reason."""

    component: str
    quantize: bool
    reason: str


@dataclass(frozen=True)
class Rules:
    """One architecture's rules. `known` is false where the generic table had to do."""

    architecture: str
    known: bool
    keep: Mapping[str, re.Pattern[str]]
    quantize: Mapping[str, re.Pattern[str]]
    fused: tuple[tuple[str, ...], ...]
    whole: bool
    spellings: tuple[str, ...]

    @classmethod
    def for_config(cls, config: Mapping[str, Any]) -> Self:
        """The rules for a model's config.json, by its `model_type`."""
        table = architecture_of(config)
        return cls(
            architecture=str(config.get("model_type", "")) or "unknown",
            known=table.name != GENERIC,
            keep={component: _compile(patterns) for component, patterns in table.keep.items()},
            quantize={component: _compile(patterns) for component, patterns in table.quantize.items()},
            fused=table.fused,
            whole=table.whole,
            spellings=table.spellings,
        )

    def judge(self, tensor: Shaped) -> Verdict:
        """Judge `tensor`."""
        name = "." + module_name(tensor.name)
        for component, pattern in self.keep.items():
            if pattern.fullmatch(name):
                return Verdict(component, quantize=False, reason=f"kept in {tensor.dtype}")
        for component, pattern in self.quantize.items():
            if pattern.fullmatch(name):
                return self._judge_linear(tensor, component)
        return Verdict("other", quantize=False, reason="no rule names it")

    def _judge_linear(self, tensor: Shaped, component: str) -> Verdict:
        if not tensor.name.endswith(".weight"):
            return Verdict(component, quantize=False, reason="not a weight")
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            return Verdict(component, quantize=False, reason=f"not a matrix: {list(tensor.shape)}")
        if tensor.dtype not in QUANTIZABLE:
            return Verdict(component, quantize=False, reason=wrong_dtype(tensor))
        return Verdict(component, quantize=True, reason="decoder linear")

    def group_of(self, module: str) -> tuple[str, ...]:
        """The modules that engines fuse with `module`, itself included; empty if it stands alone."""
        parent, _, leaf = module.rpartition(".")
        group = next((group for group in self.fused if leaf in group), ())
        return tuple(f"{parent}.{member}" if parent else member for member in group)


def wrong_dtype(tensor: Shaped) -> str:
    """The reason that keeps a linear layer whose dtype is none of `QUANTIZABLE`."""
    return f"{tensor.dtype} is not a dtype to quantize from"


def module_name(tensor_name: str) -> str:
    """The module a tensor belongs to: its name without the last part (`weight`, `bias`)."""
    for ending in (".weight", ".bias"):
        if tensor_name.endswith(ending):
            return tensor_name.removesuffix(ending)
    return tensor_name


def scale_name(tensor_name: str) -> str:
    """The name of the scale that belongs to a quantized weight; the same in all formats."""
    return f"{module_name(tensor_name)}.weight_scale"


def is_linear(tensor: Shaped, component: str) -> bool:
    """Whether engines build a linear layer for `tensor`: a matrix called `weight` that is not a table."""
    matrix = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    return matrix and component not in {"embeddings", "norms"}


def _compile(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(translate(pattern) for pattern in patterns))
