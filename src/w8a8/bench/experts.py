"""`w8a8 bench quantize --experts`: mixtures of 128 experts beside a dense model of as many bytes.

The experts are those of Qwen3 30B-A3B, spelled in three ways: a tensor for each expert and projection, one tensor for
all experts, and that tensor transposed. Runs take turns, as in `w8a8 bench quantize`.
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w8a8.bench.quantize import Contender, Row, make_checkpoint, race, write_checkpoint
from w8a8.machine import usable_cores
from w8a8.terminal.output import plain_table

EXPERTS, HIDDEN, INNER = 128, 2048, 768
ATTENTION = {"q_proj": (4096, HIDDEN), "k_proj": (512, HIDDEN), "v_proj": (512, HIDDEN), "o_proj": (HIDDEN, 4096)}
DENSE = "dense, Gemma 4 31B's layers"


@dataclass(frozen=True, slots=True)
class ExpertsResult:
    """The table: the row of the dense model first; `bytes` are those of each row's source."""

    cores: int
    bytes: Mapping[str, int]
    rows: tuple[Row, ...]

    def ratio(self, row: Row) -> float:
        """Seconds per byte, as a multiple of the dense model's."""
        dense = self.rows[0]
        return row.seconds / self.bytes[row.name] / (dense.seconds / self.bytes[dense.name])

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        rows = [{**asdict(row), "seconds": row.seconds, "ratio_to_dense": self.ratio(row)} for row in self.rows]
        return {"cores": self.cores, "bytes": dict(self.bytes), "rows": rows}


def bench(gib: float, *, runs: int, folder: Path, notice: Callable[[str], None] = lambda _: None) -> ExpertsResult:
    """Make the checkpoints (once), quantize each `runs` times by turns, and collect the table."""
    folder = folder.absolute()
    out = folder / "w8a8-bench-out"
    sources = {DENSE: folder / f"gemma-4-31b-layers-{gib:g}GiB"}
    make_checkpoint(sources[DENSE], gib, notice)
    for key, (name, model_type, layer) in _layouts().items():
        sources[name] = folder / f"qwen3-30b-a3b-{key}-{gib:g}GiB"
        nbytes = sum(2 * math.prod(shape) for shape in layer.values())
        config = {"model_type": model_type, "dtype": "bfloat16", "hidden_size": HIDDEN}
        write_checkpoint(sources[name], config, layer, max(1, round(gib * 2**30 / nbytes)), notice)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        quantize = [sys.executable, "-m", "w8a8", "quantize", "--quiet"]
        contenders = [
            Contender(name, [*quantize, str(source), str(out)], lambda _run: {"NUMBA_CACHE_DIR": cache})
            for name, source in sources.items()
        ]
        try:
            rows = race(contenders, runs, out, {}, notice)
        finally:
            shutil.rmtree(out, ignore_errors=True)
    sizes = {name: sum(f.stat().st_size for f in path.glob("*.safetensors")) for name, path in sources.items()}
    return ExpertsResult(usable_cores(), sizes, rows)


def show(result: ExpertsResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    table = plain_table("GiB", "seconds", "min-max", "x dense, per byte", "peak MiB", "source", left=0)
    for row in result.rows:
        table.add_row(
            f"{result.bytes[row.name] / 2**30:.2f}",
            f"{row.seconds:.2f}",
            f"{min(row.all_seconds):.2f}-{max(row.all_seconds):.2f}",
            f"{result.ratio(row):.2f}",
            f"{row.peak_mib:.0f}",
            row.name,
        )
    say(f"{result.cores} cores, medians of {len(result.rows[0].all_seconds)}")
    say(table)


def _layouts() -> dict[str, tuple[str, str, dict[str, tuple[int, ...]]]]:
    """What the rows are called, the architectures that store experts so, and the tensors of a layer."""
    attention: dict[str, tuple[int, ...]] = {f"self_attn.{leaf}.weight": shape for leaf, shape in ATTENTION.items()}
    own: dict[str, tuple[int, ...]] = {}
    for expert in range(EXPERTS):
        own |= {f"mlp.experts.{expert}.{leaf}_proj.weight": (INNER, HIDDEN) for leaf in ("gate", "up")}
        own[f"mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, INNER)
    up, down = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    stacked = {"mlp.experts.gate_up_proj": up, "mlp.experts.down_proj": down}
    turned = {"feed_forward.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER),
              "feed_forward.experts.down_proj": (EXPERTS, INNER, HIDDEN)}  # fmt: skip
    return {
        "experts": (f"{EXPERTS} experts, a tensor each", "qwen3_moe", attention | own),
        "stacked": (f"{EXPERTS} experts in one tensor", "qwen3_vl_moe_text", attention | stacked),
        "transposed": (f"{EXPERTS} experts in one transposed tensor", "llama4_text", attention | turned),
    }
