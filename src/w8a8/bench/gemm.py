"""`w8a8 bench gemm`: time the INT8 kernels on this machine's GPU, against everything else that could do their work.

The products are every linear layer of Gemma 4 31B as vLLM runs it (q, k, v and gate, up fused), whole and cut for 2 and
4 GPUs, for 1 to 4096 tokens. The contenders are `scaled_int8_mm`; vLLM's Triton kernel, if a vLLM is installed; vLLM's
CUTLASS kernel, in vLLM's environment and on GPUs where CUTLASS has INT8; `torch._int_mm` with scaling behind it; and
BF16 `matmul`. They take turns in one run. Events on the device time each launch, after a write to more memory than its
caches hold; medians are shown. Beside that, `quantize_per_token` is compared with a copy of as many bytes.

Every result is checked in the same run (`contenders.py`), so a number always belongs to a right result.

With `tune`, the fastest tile for each product is found first and stored, beside the time of the kernel that vLLM itself
would choose, measured in the same turns (`w8a8.kernels.gpu.tiles` reads it back).
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from w8a8.bench.contenders import PEERS, Problem, able, check, problems, torch_kernels, vllm_kernels
from w8a8.bench.contest import Clock, DeviceClock, race
from w8a8.bench.model import HIDDEN, INTERMEDIATE, KV, Q
from w8a8.bench.tuning import compile_ahead
from w8a8.bench.tuning import tune as find_tile
from w8a8.bench.vllm_kernel import Vllm, find_vllm
from w8a8.errors import NoDeviceError, SelfCheckError
from w8a8.kernels.gpu import tiles
from w8a8.kernels.gpu.quantize import quantize_per_token
from w8a8.runtime.linear import quantize_tokens
from w8a8.storage.writer import disk_errors

COLUMNS = ((Q + 2 * KV, HIDDEN), (2 * Q + 2 * 2048, HIDDEN), (2 * INTERMEDIATE, HIDDEN))
"""[out, in] of layers that several GPUs cut along `out`: q, k, v of sliding and of full attention; gate, up."""
ROWS = ((HIDDEN, Q), (HIDDEN, 2 * Q), (HIDDEN, INTERMEDIATE))
"""[out, in] of layers that several GPUs cut along `in`: o of both kinds of attention; down."""
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
QUANTIZED = ((1, HIDDEN), (256, HIDDEN), (4096, HIDDEN), (4096, INTERMEDIATE))
"""[tokens, values] for `quantize_per_token`."""


def shapes(parallel: Sequence[int] = (1, 2, 4)) -> tuple[tuple[int, int], ...]:
    """Return [out, in] of every linear layer's share on one GPU of 1, 2 and 4 (`parallel`), without repetitions."""
    column = [(out // gpus, size) for gpus in parallel for out, size in COLUMNS]
    row = [(out, size // gpus) for gpus in parallel for out, size in ROWS]
    return tuple(dict.fromkeys((*column, *row)))


@dataclass(frozen=True, slots=True)
class GemmRow:
    """One product: milliseconds of every turn, by contender (`w8a8`, and those of `PEERS` that took part)."""

    tokens: int
    outputs: int
    inputs: int
    tile: str
    ms: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float | None:
        """Return the median milliseconds of a contender; None if it took no part."""
        return statistics.median(self.ms[name]) if name in self.ms else None

    def ratio(self, peer: str) -> float | None:
        """Return how many times as fast as `peer` this project's kernel is; None if that took no part."""
        ours, theirs = self.median("w8a8"), self.median(peer)
        return theirs / ours if ours and theirs else None

    def to_dict(self) -> dict[str, Any]:
        """Add medians, ratios, GB/s of weights, tokens and results, and tera operations per second."""
        ours = statistics.median(self.ms["w8a8"])
        moved = self.outputs * self.inputs + self.tokens * (self.inputs + 2 * self.outputs)
        return {
            **asdict(self),
            "median_ms": {name: self.median(name) for name in self.ms},
            "ratio": {name: self.ratio(name) for name in self.ms if name != "w8a8"},
            "gb_s": moved / ours / 1e6,
            "tera_ops": 2 * self.tokens * self.outputs * self.inputs / ours / 1e9,
        }


@dataclass(frozen=True, slots=True)
class QuantizeRow:
    """`quantize_per_token` of BF16 [tokens, values]: milliseconds of every turn."""

    tokens: int
    values: int
    ms: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Add the median and GB/s of values read and codes written."""
        median = statistics.median(self.ms)
        return {**asdict(self), "median_ms": median, "gb_s": self.tokens * self.values * 3 / median / 1e6}


@dataclass(frozen=True, slots=True)
class GemmResult:
    """All measurements, the GPU and the versions; `copy_gb_s` is the speed of a large copy, read and written."""

    device: str
    arch: str
    versions: Mapping[str, str | None]
    copy_gb_s: float
    rows: tuple[GemmRow, ...]
    quantized: tuple[QuantizeRow, ...]
    stored: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, complete enough to report back."""
        return {
            **asdict(self),
            "rows": [row.to_dict() for row in self.rows],
            "quantized": [row.to_dict() for row in self.quantized],
            "geometric_mean": {peer: self.mean(peer) for peer in PEERS},
        }

    def mean(self, peer: str) -> float | None:
        """Return the geometric mean of the ratios to `peer`; None if it took no part."""
        ratios = [ratio for row in self.rows if (ratio := row.ratio(peer)) is not None]
        return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else None


def find_device() -> torch.device:
    """Return the GPU. Raises NoDeviceError where torch sees none."""
    if not torch.cuda.is_available():
        raise NoDeviceError(
            f"torch {torch.__version__} sees no GPU, so there is nothing to time; `w8a8 bench compile` needs none and "
            "shows the compiled kernels"
        )
    return torch.device("cuda", torch.cuda.current_device())


def bench(
    *,
    runs: int,
    tune: bool = False,
    vllm: Path | None = None,
    device: torch.device | None = None,
    clock: Clock | None = None,
    layers: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] = TOKENS,
    quantized: Sequence[tuple[int, int]] = QUANTIZED,
    copied: int = 1 << 30,
    notice: Callable[[str], None] = lambda _: None,
) -> GemmResult:
    """Time every layer [out, in] and number of tokens; with `tune`, find and store the best tiles before.

    `vllm` is a folder or a Python that has vLLM; it defaults to this environment's vLLM, if any. `copied` is the number
    of bytes whose copy is timed. Raises NoDeviceError without a GPU, SelfCheckError where a kernel's result is wrong,
    DiskFullError or UnwritableError where tiles cannot be stored.
    """
    # 1) The GPU, and the peers that are here.
    device = device or find_device()
    clock = clock or DeviceClock(device)
    arch = tiles.architecture(device)
    layers = shapes() if layers is None else layers
    peer = find_vllm(vllm, notice)
    path = None
    with torch.inference_mode():
        # 2) Find and store the best tiles, if asked for.
        if tune:
            if device.type == "cuda":
                count = compile_ahead(arch, [(m, n, k) for n, k in layers for m in tokens])
                notice(f"{count} kernels compiled")
            found = [find_tile(arch, problem, peer, clock, notice) for problem in problems(layers, tokens, device)]
            with disk_errors(tiles.store_path(arch), resumable=False):
                path = tiles.store(arch, found)
        # 3) Time every product, then quantizing, then a copy.
        rows = tuple(_row(arch, problem, peer, clock, runs, notice) for problem in problems(layers, tokens, device))
        rest = tuple(_quantize_row(*size, device, clock, runs) for size in quantized)
        copy_gb_s = _copy_gb_s(copied, device, clock, runs)
    return GemmResult(_name(device), arch, versions(peer), copy_gb_s, rows, rest, str(path) if path else None)


def versions(peer: Vllm | None) -> dict[str, str | None]:
    """Return the versions of everything that the numbers depend on; None for parts that are not here."""
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": peer.version if peer else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Return the version of the kernel's GPU driver, where it tells one."""
    for path in (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")):
        if path.is_file():
            return path.read_text(encoding="utf-8").splitlines()[0].strip()
    return None


def _name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device) if device.type == "cuda" else device)


def _row(
    arch: str, problem: Problem, peer: Vllm | None, clock: Clock, runs: int, notice: Callable[[str], None]
) -> GemmRow:
    """Check and time all contenders on one problem."""
    m, n, k = problem.sizes
    tile = tiles.choose(arch, m, n, k)
    check(problem.ours(tile), problem.reference(), f"tile {tile}'s")
    peers = {**vllm_kernels(arch, problem, peer), **torch_kernels(problem)}
    contenders = {"w8a8": lambda: problem.ours(tile), **able(peers, problem, notice)}
    row = GemmRow(m, n, k, str(tile), race(contenders, clock, runs))
    notice(f"{m} x {n} x {k}: " + ", ".join(f"{name} {row.median(name):.3f} ms" for name in contenders))
    return row


def _quantize_row(tokens: int, values: int, device: torch.device, clock: Clock, runs: int) -> QuantizeRow:
    """Check and time `quantize_per_token`."""
    x = torch.randn(tokens, values, device=device).to(torch.bfloat16)
    for ours, expected in zip(quantize_per_token(x), quantize_tokens(x), strict=True):
        if not torch.equal(ours, expected):
            raise SelfCheckError(f"quantize_per_token is wrong for {[tokens, values]}; please report this")
    return QuantizeRow(tokens, values, race({"w8a8": lambda: quantize_per_token(x)}, clock, runs)["w8a8"])


def _copy_gb_s(size: int, device: torch.device, clock: Clock, runs: int) -> float:
    """Return GB/s, read and written, of copying `size` bytes."""
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(race({"copy": lambda: target.copy_(source)}, clock, runs)["copy"]) / 1e6


def show(result: GemmResult, say: Callable[[Any], None]) -> None:
    """Print the tables for a person; `say` prints text and Rich tables."""
    from w8a8.terminal.output import plain_table

    known = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)
    say(f"{result.device} ({result.arch}), {known}; copies at {result.copy_gb_s:.0f} GB/s")
    peers = {name: short for name, (short, _) in PEERS.items() if result.mean(name) is not None}
    table = plain_table(
        *("out x in", "tokens", "tile", "W8A8 ms", *(f"{short} ms" for short in peers.values())),
        *(f"x {short}" for short in peers.values()),
        *("GB/s", "TOPS"),
        left=1,
    )
    for row in result.rows:
        values = row.to_dict()
        medians = [row.median(name) for name in ("w8a8", *peers)]
        ratios = [row.ratio(name) for name in peers]
        table.add_row(
            f"{row.outputs} x {row.inputs}",
            f"{row.tokens}",
            row.tile,
            *("" if ms is None else f"{ms:.3f}" for ms in medians),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{values['gb_s']:.0f}",
            f"{values['tera_ops']:.1f}",
        )
    say(table)
    for peer in peers:
        say(f"{result.mean(peer):.2f} times as fast as {PEERS[peer][1]}, in the geometric mean")
    for quantized in result.quantized:
        values = quantized.to_dict()
        share = values["gb_s"] / result.copy_gb_s
        size = f"{quantized.tokens} x {quantized.values}"
        say(f"quantize_per_token {size}: {values['gb_s']:.0f} GB/s, {share:.0%} of a copy")
    if result.stored:
        say(f"the tiles found are stored in {result.stored}")
