"""Real architectures by their tensors' names: checkpoints that exist as headers only."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from w8a8.checkpoint import Checkpoint, Shard, TensorSpec
from w8a8.checkpoint.header import DTYPE_BITS
from w8a8.formats import Selection
from w8a8.plan import Plan, make_plan, module_name
from w8a8.plan.viewing import format_for, view_of

NAMES = sorted(path.stem for path in (Path(__file__).parent / "plan" / "names").glob("*.json"))
"""`names/*.json`: what transformers saves for each family, every tensor with its kind and the verdict expected."""


def headers(tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any]) -> Checkpoint:
    """A one-shard checkpoint of `name -> (dtype, shape)` without any file behind it."""
    specs, offset = [], 64
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        specs.append(TensorSpec(name, dtype, shape, "model.safetensors", offset, nbytes))
        offset += nbytes
    shard = Shard("model.safetensors", offset, tuple(specs))
    return Checkpoint(Path("/nowhere"), config, (shard,), (), (), indexed=False)


def plan_of(
    checkpoint: Checkpoint,
    format: str | None = None,  # noqa: A002
    compat: str | None = None,
    **options: Any,
) -> Plan:
    """`make_plan` with a format's name, or the one that is written where none is asked for."""
    seen = view_of(checkpoint)
    return make_plan(seen, format_for(seen, format, compat), source="test", **options)


def plan_from(values: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.to_dict` made `values` of."""
    return msgspec.convert({**values, "calibration": values["calibration"] or None}, Plan)


@dataclass(frozen=True)
class Family:
    """One file of `names`: a checkpoint, and what is known of its tensors."""

    checkpoint: Checkpoint
    kinds: Mapping[str, str]
    quantized: frozenset[str]

    @classmethod
    def load(cls, name: str) -> "Family":
        values = json.loads((Path(__file__).parent / "plan" / "names" / f"{name}.json").read_text())
        checkpoint = headers(
            {name: ("BF16", tuple(t["shape"])) for name, t in values["tensors"].items()}, values["config"]
        )
        seen = view_of(checkpoint)
        tensors = {name: values["tensors"][seen.stacks.get(name, tensor).name] for name, tensor in seen.tensors.items()}
        return cls(
            checkpoint,
            {name: t["kind"] for name, t in tensors.items()},
            frozenset(name for name, t in tensors.items() if t["quantize"]),
        )

    @property
    def linear_layers_left(self) -> set[str]:
        """Module names of the linear layers that stay as they are."""
        return {module_name(n) for n, kind in self.kinds.items() if kind == "linear" and n not in self.quantized}


def selection(quantized: list[str], left_alone: list[str]) -> Selection:
    """A selection of these modules, with nothing else in the file."""
    return Selection(
        quantized, left_alone, [TensorSpec(f"{n}.weight", "BF16", (8, 8), "s", 0, 128) for n in left_alone]
    )
