"""`w8a8 inspect`: a checkpoint at a glance, from its headers alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.checkpoint.finding import open_headers
from w8a8.formats import detect
from w8a8.formats.detect import UNQUANTIZED
from w8a8.formats.foreign import quantized_as
from w8a8.plan import Rules
from w8a8.sources.opening import owners

_SCALES = (".weight_scale", ".weight_scale_inv", ".weight_zero_point")
"""Ends of the names of what belongs to weights, also where these cannot be read."""


@dataclass(frozen=True, slots=True)
class ComponentRow:
    """The tensors of one component and dtype, as they are stored; `parameters` are those of the model."""

    component: str
    dtype: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint at a glance. `parameters` leaves out the scales of a quantized one.

    `recipe` is how this tool quantized it, and on what text, as its first shard says; else empty.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    shards: int
    tensors: int
    parameters: int
    nbytes: int
    components: tuple[ComponentRow, ...]
    scheme: str
    w8a8: bool
    recipe: str
    excludes: tuple[str, ...]
    not_needed: tuple[str, ...]
    specs: tuple[TensorSpec, ...]

    def to_dict(self, *, tensors: bool = False) -> dict[str, Any]:
        """Plain JSON values; with every tensor if asked."""
        values = asdict(self)
        if not tensors:
            del values["specs"]
        return values


def inspect(source: str | Path) -> Inspection:
    """Open a checkpoint, quantized or not, and summarize its headers. Raises `w8a8.W8A8Error`.

    `source` is a folder or a Hub id; of a repository that is not in the cache, only the headers are fetched.
    """
    checkpoint = open_headers(source)
    rules = Rules.for_config(checkpoint.config)
    scheme = detect(checkpoint.config)
    totals: dict[tuple[str, str], list[int]] = {}
    quantized, owned = owners(checkpoint)
    for tensor in checkpoint.tensors.values():
        owner = owned[tensor.name]
        beside = tensor.name != owner.stored.name or tensor.name.endswith(_SCALES)
        component = "scales" if beside else rules.judge(owner).component
        row = totals.setdefault((component, tensor.dtype), [0, 0, 0])
        for i, value in enumerate((1, tensor.numel if beside else owner.numel, tensor.nbytes)):
            row[i] += value
    rows = [ComponentRow(component, dtype, *row) for (component, dtype), row in totals.items()]
    architectures = checkpoint.config.get("architectures")
    return Inspection(
        name=checkpoint.name,
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        model_type=str(checkpoint.config.get("model_type", "")),
        shards=len(checkpoint.shards),
        tensors=len(checkpoint.tensors),
        parameters=sum(row.parameters for row in rows if row.component != "scales"),
        nbytes=checkpoint.nbytes,
        components=tuple(sorted(rows, key=lambda row: -row.nbytes)),
        scheme=_summary(checkpoint, quantized),
        w8a8=scheme.w8a8,
        recipe=_recipe(checkpoint),
        excludes=scheme.excludes,
        not_needed=tuple(left.name for left in checkpoint.left_out),
        specs=tuple(checkpoint.tensors.values()),
    )


def _summary(checkpoint: Checkpoint, quantized: str) -> str:
    scheme = detect(checkpoint.config)
    if checkpoint.gguf and checkpoint.gguf.label:
        return f"{checkpoint.gguf.label}; dtypes and bytes are those of the dequantized model"
    if quantized and not scheme.w8a8:
        return f"{quantized}; `quantize` and `convert` read it"
    return (scheme == UNQUANTIZED and quantized_as(checkpoint.tensors.values())) or scheme.summary


def _recipe(checkpoint: Checkpoint) -> str:
    metadata = checkpoint.shards[0].metadata
    return ", on ".join(metadata[key] for key in ("w8a8_recipe", "w8a8_calibration") if key in metadata)
