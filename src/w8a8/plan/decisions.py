"""What becomes of tensors, and of those together that engines load as one: fused layers, and the experts of a layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from w8a8.checkpoint import TensorSpec
from w8a8.errors import FusedGroupError
from w8a8.formats import Selection
from w8a8.formats.ignoring import experts_left, whole_modules
from w8a8.plan.rules import Rules, experts_of, is_linear, module_name


@dataclass(frozen=True, slots=True)
class Decision:
    """The fate of one logical tensor of the source (`LogicalTensor.spec`), and the reason."""

    tensor: TensorSpec
    component: str
    quantize: bool
    reason: str


def check_groups(decisions: list[Decision], rules: Rules) -> None:
    """Raise `FusedGroupError` where what engines load as one would be quantized in part."""
    units: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.tensor.name.endswith(".weight"):
            units.setdefault(rules.unit_of(module_name(decision.tensor.name)), []).append(decision)
    for unit in units.values():
        chosen = next((d for d in unit if d.quantize), None)
        other = next((d for d in unit if not d.quantize), None)
        if chosen and other:
            module = module_name(chosen.tensor.name)
            there = {module_name(d.tensor.name) for d in unit}
            experts = experts_of(module)
            what = f"all of {experts}" if experts else ", ".join(m for m in rules.group_of(module) if m in there)
            raise FusedGroupError(
                f"{module} would be quantized but {module_name(other.tensor.name)} would not ({other.reason}); engines "
                f"load {what} as one layer, so include or exclude them together"
            )


def select(decisions: Sequence[Decision], rules: Rules, split: Sequence[Decision] = ()) -> Selection:
    """The quantized layers by name, and every linear layer that is left alone.

    The second list has layers that the file does not hold: a tied lm_head, which engines still build as a layer, and
    the missing member of a fused group (v_proj where keys serve as values), which engines still ask about. Of experts
    it names all of a layer as one; `split` are the decisions on them where `decisions` see whole stacks.
    """
    quantized = {module_name(d.tensor.name) for d in decisions if d.quantize}
    copied = [d for d in decisions if not d.quantize]
    left = {module_name(d.tensor.name) for d in copied if is_linear(d.tensor, d.component) or _holds_experts(d)}
    experts, experts_alone = _experts(split or decisions)
    left = {name for name in left if not experts_of(name)}.union(experts_alone, *map(rules.group_of, left))
    if not any(name.split(".")[-1] == "lm_head" for name in left | quantized):
        left.add("lm_head")
    patterns = [*experts_left(experts_alone, experts), *(whole_modules(quantized, left) if rules.whole else ())]
    return Selection(sorted(quantized), sorted(left), [d.tensor for d in copied], list(dict.fromkeys(patterns)))


def _experts(decisions: Sequence[Decision]) -> tuple[set[str], set[str]]:
    """The experts by their layers (`model.layers.0.mlp.experts`): those quantized, and those left alone."""
    units = [(experts_of(module_name(d.tensor.name)), d.quantize) for d in decisions]
    quantized = {unit for unit, quantize in units if unit and quantize}
    return quantized, {unit for unit, _ in units if unit} - quantized


def _holds_experts(decision: Decision) -> bool:
    """Whether a tensor holds experts: by the rules, or as the matrices of a module that no rule knows."""
    return decision.component == "experts" or (decision.component == "other" and len(decision.tensor.shape) == 3)
