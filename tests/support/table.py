"""The table of supported architectures: results as JSON in `docs/measured/support.json`, shown as `docs/support.md`."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import msgspec

from tests.support.check import SMALL, Row, Tried
from tests.support.recipes import YES
from tests.support.tiny import OTHERS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "measured" / "support.json"
PAGE = ROOT / "docs" / "support.md"

ENOUGH = 0.99
"""The share of a decoder's weights that an architecture without a remark has in INT8."""
RUNTIME_BOUND = 0.01
"""The relative RMS error of logits up to which `w8a8.runtime` is right."""
VLLM_BOUNDS = {"float32": 0.01, "bfloat16": 0.25}
"""The difference of a log-probability, in nats, up to which vLLM is right, by what it computes in.

In FP32 both sides compute the same: weights are such that vLLM's INT8 sums are exact on every CPU (`tiny.py`).
"""
EXACT = 1e-5
"""The difference of a log-probability, in nats, that FP32 explains where both compute the same."""
ALIKE = 2
"""Times what explains a result's difference, where vLLM is not exact with the source: up to which it does.

What explains it is the source's difference, and what rounding to INT8 changes: activations that differ a little fall on
other steps, more of them with every layer.
"""
SHOWN = 3
"""How many names of matrices a remark gives."""


class Verdict(StrEnum):
    """What became of a result in vLLM."""

    RIGHT = "right"
    ALIKE = "off with the source too"
    NO_SOURCE = "not even the source"
    UNKNOWN = "no such model"
    OURS = "wrong"
    NOT_RUN = "not run"


HEAD = """\
# Supported architectures

Every architecture of transformers {transformers} with a text decoder, made tiny with random weights, quantized,
verified and run. `make support` makes this table; it goes on where it was interrupted.

- **INT8**: the share of the weights of the decoder's linear layers and experts that become INT8. Layers of fewer than
  {small} outputs (routers, gates that give a number per head), convolutions and parameters outside linear layers do not
  count.
- **verified**: `w8a8 verify` finds nothing wrong.
- **runtime**: the relative RMS error of the logits in `w8a8.runtime` against the exact reference: transformers' own
  model of the source in FP32, whose products with INT8 weights are computed as the format defines them. At most
  {runtime} is right.
- **vLLM**: the largest difference of a log-probability from that reference, in nats, when stock vLLM {vllm} loads the
  result on a CPU and computes in FP32. At most {vllm_bound} is right; {bf16_bound} where vLLM computes in BF16 alone.
  Where a CPU has no AMX, vLLM has no kernel for experts in INT8, and its MLA asks for a weight that its kernel for
  linear layers has let go; its own configuration, loader and router run there with the one kernel replaced by plain
  torch, and an empty weight left by the other. Its other operators run as plain PyTorch, too (`custom_ops: none`): on
  CPUs its compiled rotary one is wrong for DeepSeek's attention, whatever the weights. Of models for text and images,
  the text decoder alone runs. Where the result is not right in vLLM, it runs the source too, and what that gives is
  compared with transformers' model of the source in FP32.
- **recipes**: whether `--recipe smooth+gptq` takes the model, and `w8a8 verify` its result.

Of {all} architectures, {whole} have at least 99% of their decoder in INT8, give no warning, and run right in
`w8a8.runtime`. Another {but} are like that but for layers that stay as they are, for the reason that their rows give.
Recipes take {calibrated} of the {tried} of those that were tried; where they do not take one, its row says why.
What vLLM makes of these and of the others:

"""
MEANING = {
    Verdict.RIGHT: "right",
    Verdict.ALIKE: "off with the source too: vLLM computes this model in another way than transformers",
    Verdict.NO_SOURCE: "vLLM does not run the source on a CPU either",
    Verdict.UNKNOWN: "vLLM {vllm}, and transformers beside it, have no such model",
    Verdict.OURS: "wrong, or not run, where the source is right",
    Verdict.NOT_RUN: "not run: an earlier step failed",
}
"""What is said of each verdict."""


@dataclass(frozen=True)
class Results:
    """All rows by `model_type`, and the versions of the packages that they were found with."""

    versions: Mapping[str, str]
    rows: Mapping[str, Row]


def read() -> Results:
    """The results kept in the repository."""
    return msgspec.json.decode(RESULTS.read_bytes(), type=Results)


def write(results: Results) -> None:
    """Keep `results`, and show them."""
    kept = msgspec.to_builtins(replace(results, rows=dict(sorted(results.rows.items()))))
    RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(results))


def page(results: Results) -> str:
    """The page of the documentation."""
    rows = sorted(results.rows.values(), key=lambda row: row.model_type)
    whole = [row for row in rows if right(row)]
    but = [row for row in rows if not right(row) and explained(row)]
    rest = [row for row in rows if not (right(row) or explained(row))]
    head = HEAD.format(
        **results.versions,
        small=SMALL,
        runtime=RUNTIME_BOUND,
        vllm_bound=VLLM_BOUNDS["float32"],
        bf16_bound=VLLM_BOUNDS["bfloat16"],
        whole=len(whole),
        but=len(but),
        calibrated=sum(row.recipes == YES for row in [*whole, *but]),
        tried=sum(bool(row.recipes) for row in [*whole, *but]),
        all=len(rows),
    )
    counted = [Counter(map(in_vllm, some)) for some in (whole, [*but, *rest])]
    verdicts = [
        f"| {meaning.format(**results.versions)} | {counted[0][verdict]} | {counted[1][verdict]} |"
        for verdict, meaning in MEANING.items()
    ]
    others = [f"- {reason}: {', '.join(f'`{name}`' for name in names)}" for reason, names in OTHERS.items()]
    parts = [
        head + "| in vLLM | whole | others |\n| --- | ---: | ---: |\n" + "\n".join(verdicts) + "\n",
        "## Whole\n",
        _table(whole),
        "## Whole, but for what engines take in no INT8\n",
        _table(but),
        "## In part, or not\n",
        _table(rest),
        "## Not tried\n",
        "transformers lists these beside decoders:\n",
        "\n".join(others),
    ]
    return "\n".join(parts) + "\n"


def right(row: Row) -> bool:
    """Whether all of the decoder is in INT8, without a warning, and runs right."""
    return row.share is not None and ENOUGH <= row.share <= 1 and not row.warnings and _runs(row)


def explained(row: Row) -> bool:
    """Whether all of the decoder is in INT8 but for what stays as it is for a stated reason, and runs right."""
    return bool(row.because) and ENOUGH <= row.possible <= 1 + 1e-6 and _runs(row)


def _runs(row: Row) -> bool:
    return row.verified and row.runtime is not None and row.runtime <= RUNTIME_BOUND


def agrees(tried: Tried) -> bool:
    """Whether vLLM gives what is expected of a checkpoint."""
    return tried.difference is not None and tried.difference <= VLLM_BOUNDS[tried.dtype]


def in_vllm(row: Row) -> Verdict:
    """What became of the result in vLLM, and by whose fault."""
    if row.vllm is None:
        return Verdict.NOT_RUN
    if not row.vllm.known:
        return Verdict.UNKNOWN
    if agrees(row.vllm):
        return Verdict.RIGHT
    if row.source and row.source.failed:
        return Verdict.NO_SOURCE
    ours, theirs, step = row.vllm.difference, row.source and row.source.difference, row.rounding
    if ours and theirs and step and theirs > EXACT and ours <= ALIKE * max(theirs, step):
        return Verdict.ALIKE
    return Verdict.OURS


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| model_type | class | INT8 | verified | runtime | vLLM | recipes | |",
        "| --- | --- | ---: | --- | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        share = "" if row.share is None else f"{100 * row.share:.1f}%"
        runtime = "" if row.runtime is None else f"{row.runtime:.1g}"
        vllm = in_vllm(row) if row.vllm is None or row.vllm.difference is None else _nats(row.vllm)
        verified, recipes = "yes" if row.verified else "no", {YES: YES, "": "not tried"}.get(row.recipes, "no")
        cells = (f"`{row.model_type}`", row.name, share, verified, runtime, vllm, recipes, _remark(row))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _nats(tried: Tried) -> str:
    return f"{tried.difference:.1g}" + (" (BF16)" if tried.dtype == "bfloat16" else "")


def _remark(row: Row) -> str:
    """What is missing, and why."""
    remarks = []
    if row.failed:
        remarks.append(row.failed)
    remarks += [f"{part}: {reason}" for part, reason in row.because.items()]
    if row.left:
        more = len(row.left) - SHOWN
        remarks.append("left: " + ", ".join(row.left[:SHOWN]) + (f" and {more} more" if more > 0 else ""))
    if row.warnings:
        remarks.append("warns")
    if row.recipes not in {"", YES}:
        remarks.append(f"recipes: {row.recipes}")
    if row.vllm and row.vllm.known and row.vllm.failed:
        remarks.append(f"vLLM: {row.vllm.failed}")
    if row.source and row.source.difference is not None:
        remarks.append(f"vLLM with the source: {_nats(row.source)}")
    elif row.source and row.vllm and row.source.failed != row.vllm.failed:
        remarks.append(f"vLLM with the source: {row.source.failed}")
    return "; ".join(remarks).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
