"""Plans that change how a checkpoint is spelled, and none of its numbers."""

from collections.abc import Iterator
from dataclasses import replace

from w8a8.checkpoint import Checkpoint
from w8a8.errors import UsageError
from w8a8.formats import Format, detect
from w8a8.formats.detect import undeclared
from w8a8.formats.provenance import PROVENANCE
from w8a8.plan.architectures import architecture_of
from w8a8.plan.decisions import Decision, select
from w8a8.plan.layout import ShardPlan, Write, lay_out
from w8a8.plan.plan import Plan, check_spelling
from w8a8.plan.rules import Rules, scale_name
from w8a8.plan.viewing import view_of
from w8a8.sources.experts import join
from w8a8.sources.opening import unsplit
from w8a8.sources.view import View

DENSE = "bf16"
"""What `convert` calls a checkpoint that is not quantized."""


def dense_view(checkpoint: Checkpoint) -> View:
    """See `checkpoint` as transformers saves its architecture: stacks of experts whole, also where they lie apart.

    Raises what `view_of` and `join` raise, and `UsageError` where it is not quantized.
    """
    view = view_of(checkpoint)
    if not view.quantized:
        raise UsageError(f"{view.path}: is not quantized, so there is nothing to convert to {DENSE}")
    return join(unsplit(view), architecture_of(view.config).saved)


def dense_plan(view: View, *, source: str, revision: str | None = None) -> Plan:
    """Plan a checkpoint of the tensors that `view` sees, decoded."""
    return _plan(view, None, source, revision)


def respelled_plan(view: View, fmt: Format, *, source: str, revision: str | None = None) -> Plan:
    """Plan the W8A8 checkpoint of which `view` sees the stored tensors in the format `fmt`: the same codes and scales.

    Raises `UsageError` where it is not W8A8, is in that format already, or engines do not load it in that format.
    """
    scheme = detect(view.checkpoint.config)
    if not scheme.w8a8:
        raise UsageError(
            f"{view.path}: {scheme.summary}; only INT8 W8A8 can be spelled as {fmt.label}. `w8a8 quantize` makes it"
        )
    if scheme.method == fmt.label:
        raise UsageError(f"{view.path}: is {fmt.label} already")
    check_spelling(view, fmt)
    return _plan(view, fmt, source, revision)


def _plan(view: View, fmt: Format | None, source: str, revision: str | None) -> Plan:
    rules = Rules.for_config(view.config)
    scales = {scale_name(t.name) for t in view.tensors.values() if t.dtype == "I8"} & view.tensors.keys()
    decisions = [
        Decision(spec, rules.judge(spec).component, spec.dtype == "I8", "spelled differently")
        for shard in view.shards
        for spec in (*(tensor.spec for tensor in shard.tensors), *(joined.spec for joined in shard.joined))
    ]
    shards = (
        lay_out(s.name, s.tensors, {}, s.joined) for s in view.shards if s.tensors or s.joined or not s.stored.tensors
    )
    config = undeclared(view.config)
    exclude: tuple[str, ...] = ()
    if fmt is not None:
        chosen = select([d for d in decisions if d.tensor.name not in scales], rules)
        shards = (_respelled(shard, fmt, scales) for shard in shards)
        config |= {"quantization_config": fmt.quantization_config(chosen)}
        exclude = tuple(chosen.left_alone)
    label = fmt.label if fmt else DENSE
    carried = next((shard.stored.metadata for shard in view.shards), {}) if fmt else {}
    return Plan(
        source=source,
        revision=revision,
        architecture=rules.architecture,
        format=label,
        recipe="convert",
        bytes_in=view.stored_bytes,
        decisions=tuple(decisions),
        shards=tuple(shards),
        exclude=exclude,
        config=config,
        metadata={"format": "pt", **carried, "w8a8_format": label},
        indexed=view.indexed,
        sidecars=tuple(name for name in view.sidecars if name not in {"config.json", PROVENANCE}),
        left_out=tuple((left.name, left.reason) for left in view.left_out),
        warnings=(),
        quantized_source=view.quantized,
    )


def _respelled(shard: ShardPlan, fmt: Format, scales: set[str]) -> ShardPlan:
    """Give the scales the shape that the format has for them."""

    def writes() -> Iterator[Write]:
        for write in shard.writes:
            rows = write.shape[0] if write.shape else 1
            yield replace(write, shape=fmt.scale_shape(rows)) if write.name in scales else write

    return replace(shard, writes=tuple(writes()))
