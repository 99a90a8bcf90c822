"""Make a `Plan` from a checkpoint's headers.

Judging goes tensor by tensor (rules, then the user's globs), then group by group (what engines fuse must be quantized
whole), then the output is laid out. Sizes follow from the headers alone.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import msgspec

from w8a8.checkpoint import TensorSpec
from w8a8.checkpoint.header import write_header
from w8a8.errors import AlreadyQuantizedError, NothingToQuantizeError, UsageError
from w8a8.formats import Format, detect
from w8a8.formats.foreign import is_adapter
from w8a8.formats.provenance import CalibrationRecord
from w8a8.plan.decisions import Decision, check_groups, select
from w8a8.plan.layout import ScaleSpec, ShardPlan, Write, lay_out
from w8a8.plan.rules import QUANTIZABLE, Rules, Verdict, is_linear, module_name, scale_name, wrong_dtype
from w8a8.sources.opening import with_stacks
from w8a8.sources.view import View
from w8a8.terminal.wording import size


@dataclass(frozen=True, slots=True)
class ComponentSummary:
    """The totals of one component: bytes in the source, bytes in the result."""

    component: str
    quantized: bool
    tensors: int
    parameters: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Plan:
    """All that a run will do: `execute` needs nothing else but the source.

    `bytes_in` are those of all source tensors as they are stored; `quantized_source` says how the source is quantized
    itself, or is empty.
    """

    source: str
    revision: str | None
    architecture: str
    format: str
    recipe: str
    bytes_in: int
    decisions: tuple[Decision, ...]
    shards: tuple[ShardPlan, ...]
    exclude: tuple[str, ...]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    indexed: bool
    sidecars: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    calibration: CalibrationRecord | None = None
    quantized_source: str = ""

    @property
    def bytes_out(self) -> int:
        """Bytes of all output shards on disk, headers included."""
        return sum(len(self.header(shard)) + shard.data_bytes for shard in self.shards)

    @property
    def ratio(self) -> float:
        """Output bytes per source byte."""
        return sum(shard.data_bytes for shard in self.shards) / max(self.bytes_in, 1)

    def header(self, shard: ShardPlan) -> bytes:
        """The safetensors header of an output shard, as it will be written."""
        return write_header(((w.name, w.dtype, w.shape, w.begin, w.end) for w in shard.writes), self.metadata)

    @property
    def shard_bytes(self) -> int:
        """Bytes of all output shards, with their headers."""
        return sum(len(self.header(shard)) + shard.data_bytes for shard in self.shards)

    def components(self) -> tuple[ComponentSummary, ...]:
        """Totals per component, quantized ones first, then by size."""
        written: dict[str, int] = {}
        for write in self.writes():
            written[write.source] = written.get(write.source, 0) + write.nbytes
        totals: dict[tuple[str, bool], list[int]] = {}
        for d in self.decisions:
            row = totals.setdefault((d.component, d.quantize), [0, 0, 0, 0])
            for i, value in enumerate((1, d.tensor.numel, d.tensor.nbytes, written[d.tensor.name])):
                row[i] += value
        rows = [ComponentSummary(component, quantized, *row) for (component, quantized), row in totals.items()]
        return tuple(sorted(rows, key=lambda row: (not row.quantized, -row.bytes_in, row.component)))

    def writes(self) -> Iterator[Write]:
        """Every output tensor, shard by shard."""
        for shard in self.shards:
            yield from shard.writes

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return {**values, "calibration": values["calibration"] or {}}

    def fingerprint(self) -> str:
        """SHA-256 of the plan: two runs with the same fingerprint write the same files from the same source."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def make_plan(
    view: View,
    fmt: Format,
    *,
    source: str,
    revision: str | None = None,
    recipe: str = "rtn",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    kept: Mapping[str, str] | None = None,
    calibration: CalibrationRecord | None = None,
) -> Plan:
    """Decide what becomes of every tensor of a checkpoint's `view` and where it will lie.

    `include` and `exclude` are globs over tensor or module names that override the rules; `exclude` wins. `kept` gives
    the modules that calibration leaves in their dtype, each with the reason; `calibration` is its record, whose
    `folded` names the copied tensors that it has changed.
    Raises `AlreadyQuantizedError`, `UsageError` (an `include` that matches no linear layer, an `exclude` that matches
    no tensor), `FusedGroupError`, `NothingToQuantizeError`.
    """
    # 1) Judge each tensor by the rules; then the user's globs and calibration have their say.
    refuse_w8a8(view)
    rules = Rules.for_config(view.config)
    check_spelling(view, fmt)
    decisions = [_decide(tensor.spec, rules) for shard in view.shards for tensor in shard.tensors]
    decisions = _override(decisions, include, quantize=True, never=rules.never)
    decisions = _override(decisions, exclude, quantize=False)
    decisions = [_calibrated(decision, kept or {}, calibration.folded if calibration else ()) for decision in decisions]
    # 2) Check that the decisions can be carried out, and that engines can load the result.
    check_groups(decisions, rules)
    split = decisions
    view, decisions = _whole_stacks(view, decisions)
    quantized = {d.tensor.name: _scale_spec(d.tensor, fmt) for d in decisions if d.quantize}
    if not quantized:
        raise NothingToQuantizeError(f"{view.path}: {_nothing(view, rules, decisions)}")
    _check_new_names(view, quantized)
    # 3) Lay the output out, and write the config.
    selection = select(decisions, rules, split)
    plan = Plan(
        source=source,
        revision=revision,
        architecture=rules.architecture,
        format=fmt.label,
        recipe=recipe,
        bytes_in=view.stored_bytes,
        decisions=tuple(decisions),
        shards=tuple(
            lay_out(shard.name, shard.tensors, quantized)
            for shard in view.shards
            if shard.tensors or not shard.stored.tensors
        ),
        exclude=tuple(selection.left_alone),
        config={**view.config, "quantization_config": fmt.quantization_config(selection)},
        metadata={"format": "pt", **(metadata or {}), **_metadata(calibration)},
        indexed=view.indexed,
        sidecars=tuple(name for name in view.sidecars if name != "config.json"),
        left_out=tuple((left.name, left.reason) for left in view.left_out),
        warnings=tuple(_warnings(rules, decisions)),
        calibration=calibration,
        quantized_source=view.quantized,
    )
    return replace(plan, warnings=(*plan.warnings, *_growth(plan, view, rules)))


def check_spelling(view: View, fmt: Format) -> None:
    """Raise `UsageError` where engines do not load the architecture in this format."""
    rules = Rules.for_config(view.config)
    if fmt.label.partition(" ")[0] not in rules.spellings:
        raise UsageError(
            f"{view.path}: vLLM does not load {rules.architecture} in the format {fmt.label}; give --format "
            f"{rules.spellings[0]}"
        )


def _metadata(calibration: CalibrationRecord | None) -> dict[str, str]:
    """What the metadata of every shard says about calibration."""
    if calibration is None:
        return {}
    text = calibration.text
    said = f"{calibration.samples} x {calibration.tokens} tokens of {text.name} (SHA-256 {text.sha256})"
    return {"w8a8_calibration": said}


def refuse_w8a8(view: View) -> None:
    """Raise `AlreadyQuantizedError` if the checkpoint is what this tool makes."""
    scheme = detect(view.checkpoint.config)
    if scheme.w8a8:
        raise AlreadyQuantizedError(f"{view.path}: already quantized ({scheme.summary}); quantize the BF16 original")


def _nothing(view: View, rules: Rules, decisions: Sequence[Decision]) -> str:
    """Say why no tensor is quantized, and what to do."""
    if is_adapter(view.tensors.values()):
        return "this is a LoRA adapter; merge it into its base model first (in peft: merge_and_unload, save_pretrained)"
    if dtypes := sorted({d.tensor.dtype for d in decisions if _of_wrong_dtype(d)}):
        return (
            f"the linear layers are {', '.join(dtypes)}, and only BF16, F16 and F32 are quantized; convert them first "
            "(in transformers: from_pretrained(SRC, dtype=torch.bfloat16).save_pretrained(NEW_FOLDER))"
        )
    if kept := [d for d in decisions if d.component in rules.reasons and is_linear(d.tensor, d.component)]:
        why = f"{kept[0].tensor.name} is left alone, since {kept[0].reason}"
        return f"{rules.architecture} has no layer to quantize, and --include would not help: {why}"
    what = "sentence-transformers model" if "modules.json" in view.sidecars else "model"
    return (
        f"no tensor of this {rules.architecture} {what} is a decoder linear layer by the rules; "
        "name them with --include, e.g. --include '*.layers.*_proj'"
    )


def _of_wrong_dtype(decision: Decision) -> bool:
    """Whether the rules would quantize it, were it not for its dtype."""
    tensor = decision.tensor
    return tensor.dtype not in QUANTIZABLE and decision.reason == wrong_dtype(tensor)


def _decide(tensor: TensorSpec, rules: Rules) -> Decision:
    verdict: Verdict = rules.judge(tensor)
    return Decision(tensor, verdict.component, verdict.quantize, verdict.reason)


def _override(
    decisions: list[Decision],
    globs: Sequence[str],
    *,
    quantize: bool,
    never: Mapping[str, str] = MappingProxyType({}),
) -> list[Decision]:
    """The decisions with what `globs` name quantized, but for the components in `never`, or not quantized."""
    option = "--include" if quantize else "--exclude"
    used: set[str] = set()
    refused: dict[str, str] = {}
    result = []
    for decision in decisions:
        name, dtype = decision.tensor.name, decision.tensor.dtype
        matching = [g for g in globs if fnmatchcase(name, g) or fnmatchcase(module_name(name), g)]
        why = never.get(decision.component) if not decision.quantize and dtype in QUANTIZABLE else None
        # A bias, norm or embedding that a wide --include happens to match is none of its business.
        if not matching or (
            quantize and not (is_linear(decision.tensor, decision.component) and decision.tensor.numel)
        ):
            pass
        elif why is not None:
            refused.update(dict.fromkeys(matching, f"{name} cannot be quantized, since {why}"))
            decision = replace(decision, reason=why)
        else:
            used.update(matching)
            if quantize and dtype not in QUANTIZABLE:
                raise UsageError(f"{option} {matching[0]!r}: {name} is {dtype}; only BF16, F16 and F32 are quantized")
            if decision.quantize != quantize:
                decision = replace(decision, quantize=quantize, reason=f"{option} {matching[0]}")
        result.append(decision)
    for glob in (glob for glob in globs if glob not in used):
        what = "linear layer" if quantize else "tensor"
        none = f"matches no {what}; `w8a8 inspect SRC --tensors` lists all names"
        raise UsageError(f"{option} {glob!r}{': ' + refused[glob] if glob in refused else ' ' + none}")
    return result


def _calibrated(decision: Decision, kept: Mapping[str, str], folded: Collection[str]) -> Decision:
    """The decision, corrected by calibration's findings."""
    name = decision.tensor.name
    if decision.quantize and module_name(name) in kept:
        return replace(decision, quantize=False, reason=kept[module_name(name)])
    return replace(decision, reason="folded") if name in folded else decision


def _whole_stacks(view: View, decisions: list[Decision]) -> tuple[View, list[Decision]]:
    """See the stacks of which no expert is quantized as the tensors that they are in the source."""
    quantized = {module_name(d.tensor.name) for d in decisions if d.quantize}
    split = {stack.name for name, stack in view.stacks.items() if module_name(name) in quantized}
    whole = with_stacks(view, {stack.name for stack in view.stacks.values()} - split)
    by_name = {d.tensor.name: d for d in decisions}
    by_name |= {stack.name: replace(by_name[name], tensor=stack.spec) for name, stack in view.stacks.items()}
    return whole, [by_name[tensor.name] for tensor in whole.tensors.values()]


def _scale_spec(tensor: TensorSpec, fmt: Format) -> ScaleSpec:
    rows = tensor.shape[0]
    return ScaleSpec(scale_name(tensor.name), fmt.scale_dtype(tensor.dtype), fmt.scale_shape(rows))


def _check_new_names(view: View, quantized: Mapping[str, ScaleSpec]) -> None:
    for spec in quantized.values():
        if spec.name in view.tensors:
            raise AlreadyQuantizedError(f"{view.path}: {spec.name} exists already; quantize the BF16 original")


def _warnings(rules: Rules, decisions: Sequence[Decision]) -> Iterator[str]:
    if not rules.known:
        chosen = sorted({_pattern(d.tensor.name) for d in decisions if d.quantize})
        kept = sorted({_pattern(d.tensor.name) for d in decisions if not d.quantize and len(d.tensor.shape) > 1})
        yield (
            f"no rules for architecture {rules.architecture!r}; the generic ones decided. Quantized: "
            f"{', '.join(chosen)}. Left alone: {', '.join(kept) or 'nothing else with two dimensions'}"
        )
    if "experts" in rules.never:
        yield f"the experts of {rules.architecture} are left alone: {rules.never['experts']}"
    if wrong := [d for d in decisions if _of_wrong_dtype(d)]:
        dtypes = ", ".join(sorted({d.tensor.dtype for d in wrong}))
        patterns = ", ".join(dict.fromkeys(_pattern(d.tensor.name) for d in wrong))
        yield f"linear layers are left alone because of their dtype, {dtypes}: {patterns}"
    odd = sorted(
        _pattern(d.tensor.name)
        for d in decisions
        if d.component == "other" and not d.quantize and is_linear(d.tensor, d.component)
    )
    if rules.known and odd:
        yield f"matrices that no rule names are left alone: {', '.join(dict.fromkeys(odd))}"


def _growth(plan: Plan, view: View, rules: Rules) -> Iterator[str]:
    """Say that the result is larger than a quantized source, and why."""
    if plan.ratio <= 1 or not plan.quantized_source:
        return
    decoded = [d for d in plan.decisions if view.tensors[d.tensor.name].decoder.label]
    kept = dict.fromkeys(d.component for d in sorted(decoded, key=lambda d: -d.tensor.nbytes) if not d.quantize)
    parts = ", ".join(part + (f" ({rules.reasons[part]})" if part in rules.reasons else "") for part in kept)
    why = ["INT8 takes 8 bits a weight"] if any(d.quantize for d in decoded) else []
    why += [f"what is left alone is stored dequantized: {parts}"] if parts else []
    yield (
        f"OUT will be larger than SRC, {size(plan.ratio * plan.bytes_in)} > {size(plan.bytes_in)}, because SRC is "
        f"quantized already ({plan.quantized_source}): {', and '.join(why)}"
    )


def _pattern(name: str) -> str:
    """A tensor's name with its numbers replaced, so that layers fall together."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
