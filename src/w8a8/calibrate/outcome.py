"""The outcome of a calibration: what it gained, which layers stay in BF16, and its record in `w8a8.json`."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from w8a8.calibrate.grouping import described
from w8a8.calibrate.setup import Setup
from w8a8.checkpoint import read_header
from w8a8.execute.shard import Finished
from w8a8.formats.provenance import CalibrationRecord, CalibrationText, NormFold
from w8a8.plan import Plan, module_name
from w8a8.recipes.budget import Damage, choose_bf16
from w8a8.recipes.costs import place_of
from w8a8.recipes.layer import Gain
from w8a8.recipes.tokens import FEW
from w8a8.runtime.experts import LAYER

LayerGains = Sequence[Gain]
"""The gains of a layer's groups."""


def choose_kept(plan: Plan, gains: Sequence[LayerGains], setup: Setup) -> dict[str, str]:
    """Choose the modules to leave in BF16 within the budget, fused groups whole; return the reason for each.

    All experts of a layer are such a group.
    """
    units: dict[tuple[int, str], list[Gain]] = defaultdict(list)
    for number, layer in enumerate(gains):
        for gain in layer:
            units[number, place_of(gain.paths[0])].append(gain)
    damages: dict[tuple[str, ...], Damage] = {}
    for (number, _), unit in units.items():
        weights = [setup.weight(number, path) for gain in unit for path in gain.paths]
        grown = sum(weight.nbytes - weight.numel - 4 * weight.shape[0] for weight in weights)
        error = sum(gain.error for gain in unit)
        damages[tuple(module_name(weight.name) for weight in weights)] = Damage(error, grown)
    chosen = choose_bf16(damages, int(setup.request.keep_bf16 * plan.bytes_out))
    if not chosen:
        setup.notice(f"--keep-bf16: no group of layers fits into {setup.request.keep_bf16:.2%} of the result")
    return {
        module: f"--keep-bf16: would cost {damages[modules].error:.1e} nats per token"
        for modules in chosen
        for module in modules
    }


def say_gains(gains: Sequence[LayerGains], notice: Callable[[str], None]) -> None:
    """Say the error of each kind of group on the held-out samples, as chosen and rounded to nearest, and the sum.

    Of experts, also how many are rounded to nearest because too few tokens reached them.
    """
    by_group: dict[str, list[Gain]] = defaultdict(list)
    for gain in (gain for layer in gains for gain in layer):
        by_group[gain.group].append(gain)
    notice("expected KL divergence from the source, in nats per token of the held-out samples:")
    for group, found in by_group.items():
        chosen = Counter(gain.chosen for gain in found)
        said = ", ".join(f"{name} in {count}" for name, count in chosen.most_common())
        what = "experts" if LAYER.fullmatch(found[0].paths[0]) else "layers"
        notice(f"{group}: {_errors(found)} ({said} of {len(found)} {what})")
    notice(f"together: {_errors([gain for found in by_group.values() for gain in found])}")
    experts: dict[tuple[int, str, str], bool] = {}
    for number, layer in enumerate(gains):
        for gain in layer:
            if match := LAYER.fullmatch(gain.paths[0]):
                experts[number, match["place"], match["number"]] = gain.few
    if few := sum(experts.values()):
        notice(
            f"{few} of {len(experts)} experts saw fewer than {FEW} tokens to learn from or to be judged by, and are "
            "rounded to nearest; a longer text reaches more (--samples)"
        )


def _errors(gains: Sequence[Gain]) -> str:
    return f"{sum(gain.error for gain in gains):.5f}, rounded to nearest {sum(gain.rtn for gain in gains):.5f}"


def finished_tensors(layers: Iterable[Path]) -> dict[str, Finished]:
    """The tensors in the files of the finished layers, by their names in the result."""
    return {spec.name: Finished(path, spec) for path in layers for spec in read_header(path).tensors}


def record(finished: Mapping[str, Finished], setup: Setup, plan: Plan, kept: Collection[str]) -> CalibrationRecord:
    """What `w8a8.json` says of the calibration: text, options, and the tensors that differ from rounding to nearest."""
    changed = sorted(d.tensor.name for d in plan.decisions if d.quantize and d.tensor.name in finished)
    folded = sorted(d.tensor.name for d in plan.decisions if not d.quantize and d.tensor.name in finished)
    norms = []
    for number in range(setup.model.count):
        for group in setup.groups[number]:
            norm = setup.weight(number, group.producer).name if group.producer and group.kind == "norm" else ""
            if norm in folded:
                into = [setup.weight(number, path).name for path in (*group.consumers, *group.readers)]
                norms.append(NormFold(norm, group.offset, tuple(into)))
    return CalibrationRecord(
        text=CalibrationText(setup.text.name, setup.text.sha256),
        samples=len(setup.samples),
        tokens=setup.request.tokens,
        keep_bf16=setup.request.keep_bf16,
        kept=tuple(sorted(kept)),
        changed=tuple(changed),
        folded=tuple(folded),
        norms=tuple(norms),
        groups=tuple(described(setup.groups)),
    )
