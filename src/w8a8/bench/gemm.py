"""`w8a8 bench gemm`: the INT8 kernels on the GPU that is there, against what else would do their work.

Every linear layer of Gemma 4 31B as vLLM runs it (q, k, v and gate, up fused), whole and cut for 2 and 4 GPUs, for 1 to
4096 tokens: `scaled_int8_mm`, vLLM's Triton kernel where a vLLM is installed, vLLM's CUTLASS kernel where this is its
environment and the GPU one that CUTLASS has INT8 for, `torch._int_mm` with scaling behind it, and BF16 `matmul`. They
take turns in one run; each launch is timed by events on the device, after a write to more memory than its caches hold;
medians are shown. Beside that, `quantize_per_token`, against a copy of as many bytes.

Results are checked in the same run: ours must equal the integer reference to the bit, vLLM's up to its rounding. A
number that does not come from a right result is not shown.

`tune` tries the tiles of `candidates` on each shape, keeps the fastest, and stores it with what the kernel that vLLM
itself would choose took in the same turns (`w8a8.kernels.gpu.tiles` reads it back).
"""

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from w8a8.bench.compiled import Vllm, find_vllm
from w8a8.bench.quantize import HIDDEN, INTERMEDIATE, KV, Q
from w8a8.errors import NoDeviceError, SelfCheckError
from w8a8.kernels.gpu import tiles
from w8a8.kernels.gpu.int8 import scaled_int8_mm
from w8a8.kernels.gpu.quantize import quantize_per_token
from w8a8.kernels.gpu.tiles import Tile, Tuned
from w8a8.runtime.linear import padded_int_mm, quantize_tokens
from w8a8.vllm_plugin.rule import cutlass_fails

COLUMNS = ((Q + 2 * KV, HIDDEN), (2 * Q + 2 * 2048, HIDDEN), (2 * INTERMEDIATE, HIDDEN))
"""[out, in] of the layers cut along `out` for several GPUs: q, k, v of sliding and of full attention; gate, up."""
ROWS = ((HIDDEN, Q), (HIDDEN, 2 * Q), (HIDDEN, INTERMEDIATE))
"""[out, in] of those cut along `in`: o of both kinds of attention; down."""
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
QUANTIZED = ((1, HIDDEN), (256, HIDDEN), (4096, HIDDEN), (4096, INTERMEDIATE))
"""[tokens, values] for `quantize_per_token`."""

_FLUSH = 512 << 20
"""Bytes written before each launch: more than any GPU's caches hold."""
_CHECKED = 64
"""Tokens whose results are checked."""
_TUNING_RUNS = 7

PEERS = {
    "vllm": ("vLLM", "vLLM's Triton kernel"),
    "cutlass": ("CUTLASS", "vLLM's CUTLASS kernel"),
    "int_mm": ("int_mm", "torch._int_mm and scaling"),
    "bf16": ("BF16", "BF16"),
}
"""The other contenders, and what tables and sentences call them."""

Work = Callable[[], Any]


def shapes(parallel: Sequence[int] = (1, 2, 4)) -> tuple[tuple[int, int], ...]:
    """[out, in] of every linear layer's share on one of so many GPUs, without repetitions."""
    column = [(out // gpus, size) for gpus in parallel for out, size in COLUMNS]
    row = [(out, size // gpus) for gpus in parallel for out, size in ROWS]
    return tuple(dict.fromkeys((*column, *row)))


@dataclass(frozen=True, slots=True)
class GemmRow:
    """One product: milliseconds of every turn of every contender (`w8a8`, and those of `PEERS` that took part)."""

    tokens: int
    outputs: int
    inputs: int
    tile: str
    ms: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float | None:
        """Milliseconds of a contender; None where it did not take part."""
        return statistics.median(self.ms[name]) if name in self.ms else None

    def ratio(self, peer: str) -> float | None:
        """How many times faster than `peer` this project's kernel is."""
        ours, theirs = self.median("w8a8"), self.median(peer)
        return theirs / ours if ours and theirs else None

    def to_dict(self) -> dict[str, Any]:
        """With medians, ratios, GB/s of weights, tokens and results, and tera operations per second."""
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
        """With GB/s of values read and codes written."""
        median = statistics.median(self.ms)
        return {**asdict(self), "median_ms": median, "gb_s": self.tokens * self.values * 3 / median / 1e6}


@dataclass(frozen=True, slots=True)
class GemmResult:
    """All of it, and on what it ran; `copy_gb_s` is what a large copy reads and writes."""

    device: str
    arch: str
    versions: Mapping[str, str | None]
    copy_gb_s: float
    rows: tuple[GemmRow, ...]
    quantized: tuple[QuantizeRow, ...]
    stored: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, which is what to report back."""
        return {
            **asdict(self),
            "rows": [row.to_dict() for row in self.rows],
            "quantized": [row.to_dict() for row in self.quantized],
            "geometric_mean": {peer: self.mean(peer) for peer in PEERS},
        }

    def mean(self, peer: str) -> float | None:
        """Geometric mean of the ratios to `peer`; None where it took no part."""
        ratios = [ratio for row in self.rows if (ratio := row.ratio(peer)) is not None]
        return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else None


class Clock(Protocol):
    """What times a piece of work."""

    def ms(self, work: Work) -> float:
        """Milliseconds that `work` takes, started with cold caches."""


class DeviceClock:
    """Times launches by events on the GPU."""

    def __init__(self, device: torch.device) -> None:
        """Take the memory that is written to empty the caches."""
        self._flush = torch.empty(_FLUSH // 4, dtype=torch.int32, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def ms(self, work: Work) -> float:
        """Milliseconds between the events before and after the launches of `work`."""
        self._flush.zero_()
        self._start.record()
        work()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))


class HostClock:
    """Times work that is done when it returns, as on a CPU."""

    def ms(self, work: Work) -> float:
        """Milliseconds by the wall."""
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3


def race(contenders: Mapping[str, Work], clock: Clock, runs: int) -> dict[str, tuple[float, ...]]:
    """Milliseconds of each contender in each of `runs` rounds, by turns, after one round that compiles and warms up."""
    rounds = [{name: clock.ms(work) for name, work in contenders.items()} for _ in range(runs + 1)]
    return {name: tuple(times[name] for times in rounds[1:]) for name in contenders}


def find_device() -> torch.device:
    """The GPU. Raises NoDeviceError where torch sees none."""
    if not torch.cuda.is_available():
        raise NoDeviceError(
            f"torch {torch.__version__} sees no GPU, so there is nothing to time; `w8a8 bench compile` shows what the "
            "kernels compile to without one"
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

    `vllm` is a folder or a Python that has vLLM, else this environment's, if any. `copied` are the bytes whose copy is
    timed. Raises NoDeviceError without a GPU, SelfCheckError where a kernel's result is wrong.
    """
    device = device or find_device()
    clock = clock or DeviceClock(device)
    arch = tiles.architecture(device)
    layers = shapes() if layers is None else layers
    peer = find_vllm(vllm, notice)
    path = None
    with torch.inference_mode():
        if tune:
            found = [_tuned(arch, problem, peer, clock, notice) for problem in _problems(layers, tokens, device)]
            path = tiles.store(arch, found)
        rows = tuple(_row(arch, problem, peer, clock, runs, notice) for problem in _problems(layers, tokens, device))
        rest = tuple(_quantize_row(*size, device, clock, runs) for size in quantized)
        copy_gb_s = _copy_gb_s(copied, device, clock, runs)
    return GemmResult(_name(device), arch, versions(peer), copy_gb_s, rows, rest, str(path) if path else None)


def versions(peer: Vllm | None) -> dict[str, str | None]:
    """Of everything that the numbers depend on; None for what is not here."""
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": peer.version if peer else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """The version of the kernel's GPU driver, where it says."""
    for path in (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")):
        if path.is_file():
            return path.read_text(encoding="utf-8").splitlines()[0].strip()
    return None


def _name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device) if device.type == "cuda" else device)


@dataclass(frozen=True, slots=True)
class Problem:
    """Operands of one product: codes int8 [M, K], [N, K] and scales float32 [M, 1], [N, 1]."""

    x: Tensor
    weight: Tensor
    x_scale: Tensor
    weight_scale: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.x.shape[0], *self.weight.shape

    def ours(self, tile: Tile) -> Tensor:
        """By this project's kernel."""
        return scaled_int8_mm(self.x, self.weight, self.x_scale, self.weight_scale, None, torch.bfloat16, tile=tile)

    def theirs(self, peer: Vllm) -> Tensor:
        """By vLLM's Triton kernel, called as its linear layer does."""
        return peer.module.triton_scaled_mm(
            self.x, self.weight.t(), scale_a=self.x_scale, scale_b=self.weight_scale, out_dtype=torch.bfloat16
        )

    def cutlass(self) -> Tensor:
        """By vLLM's CUTLASS kernel, called as its linear layer does. Takes vLLM itself, and its compiled parts."""
        from vllm import _custom_ops

        found: Tensor = _custom_ops.cutlass_scaled_mm(
            self.x, self.weight.t(), scale_a=self.x_scale, scale_b=self.weight_scale, out_dtype=torch.bfloat16
        )
        return found

    def composed(self) -> Tensor:
        """By `torch._int_mm`, which takes 17 tokens at least on CUDA, and scaling behind it."""
        acc = padded_int_mm(self.x, self.weight, tokens=32, multiple=8)
        return (acc.float() * self.weight_scale.t() * self.x_scale).to(torch.bfloat16)

    def reference(self) -> Tensor:
        """What the first tokens' results must be, to the bit: products in FP64, where these integers are exact."""
        acc = self.x[:_CHECKED].double() @ self.weight.t().double()
        return (acc.float() * self.weight_scale.t() * self.x_scale[:_CHECKED]).to(torch.bfloat16)


def _problems(layers: Sequence[tuple[int, int]], tokens: Sequence[int], device: torch.device) -> Iterator[Problem]:
    """Random operands for every layer and number of tokens, one at a time."""
    for outputs, inputs in layers:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        weight_scale = torch.rand(outputs, 1, device=device) / 1000
        for count in tokens:
            x = torch.randint(-127, 128, (count, inputs), dtype=torch.int8, device=device)
            yield Problem(x, weight, torch.rand(count, 1, device=device) / 100, weight_scale)


def _row(
    arch: str, problem: Problem, peer: Vllm | None, clock: Clock, runs: int, notice: Callable[[str], None]
) -> GemmRow:
    """All contenders on one problem, checked and timed."""
    m, n, k = problem.sizes
    tile = tiles.choose(arch, m, n, k)
    check(problem.ours(tile), problem.reference(), f"tile {tile}'s")
    activations, weight = problem.x.to(torch.bfloat16), problem.weight.to(torch.bfloat16)
    peers = {**_vllms(arch, problem, peer), "int_mm": problem.composed, "bf16": lambda: activations @ weight.t()}
    contenders = {"w8a8": lambda: problem.ours(tile), **_able(peers, problem, notice)}
    row = GemmRow(m, n, k, str(tile), race(contenders, clock, runs))
    notice(f"{m} x {n} x {k}: " + ", ".join(f"{name} {row.median(name):.3f} ms" for name in contenders))
    return row


def _vllms(arch: str, problem: Problem, peer: Vllm | None) -> dict[str, Work]:
    """vLLM's kernels that can be had here: CUTLASS only of the vLLM of this environment, where it has INT8."""
    found: dict[str, Work] = {}
    if peer is not None:
        found["vllm"] = lambda: problem.theirs(peer)
    if _takes_cutlass(arch) and importlib.util.find_spec("vllm"):
        found["cutlass"] = problem.cutlass
    return found


def _takes_cutlass(arch: str) -> bool:
    """Whether vLLM's own choice for INT8 layers on `arch` is CUTLASS, and works."""
    return arch.startswith("sm_") and not cutlass_fails(arch)


def _able(peers: Mapping[str, Work], problem: Problem, notice: Callable[[str], None]) -> dict[str, Work]:
    """Those of the peers that can do it; what they compute is checked."""
    able = {}
    for name, work in peers.items():
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - not every GPU's libraries can do what every peer asks of them
            notice(f"{name} cannot take part: {type(error).__name__}: {error}")
            continue
        if name != "bf16":
            check(result, problem.reference(), f"{name}'s", rtol=2**-7)
        able[name] = work
    return able


def check(result: Tensor, expected: Tensor, whose: str, rtol: float = 0) -> None:
    """Raises SelfCheckError where the first tokens' results are not `expected`, to the bit or within `rtol`."""
    if not torch.allclose(result[: len(expected)], expected, rtol=rtol, atol=0):
        raise SelfCheckError(f"{whose} result is wrong for {[*result.shape]}; please report this")


def _quantize_row(tokens: int, values: int, device: torch.device, clock: Clock, runs: int) -> QuantizeRow:
    """`quantize_per_token`, checked and timed."""
    x = torch.randn(tokens, values, device=device).to(torch.bfloat16)
    for ours, expected in zip(quantize_per_token(x), quantize_tokens(x), strict=True):
        if not torch.equal(ours, expected):
            raise SelfCheckError(f"quantize_per_token is wrong for {[tokens, values]}; please report this")
    return QuantizeRow(tokens, values, race({"w8a8": lambda: quantize_per_token(x)}, clock, runs)["w8a8"])


def _copy_gb_s(size: int, device: torch.device, clock: Clock, runs: int) -> float:
    """GB/s, read and written, of copying `size` bytes."""
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(race({"copy": lambda: target.copy_(source)}, clock, runs)["copy"]) / 1e6


# --- tuning -------------------------------------------------------------------------------------------------------


def candidates(arch: str, m: int, n: int, k: int) -> list[Tile]:
    """Tiles worth trying: the family's for about so many tokens, and their neighbours, one thing changed at a time."""
    first = tiles.shipped(arch, m, n, k)
    bands = [tile for _, tile in tiles.family(arch).bands if first.block_m / 2 <= tile.block_m <= first.block_m * 2]
    tried = {first: None}
    for tile in (first, *(replace(tile, split_k=first.split_k) for tile in bands)):
        for name, values in {
            "block_n": (tile.block_n // 2, tile.block_n * 2),
            "block_k": (tile.block_k // 2, tile.block_k * 2),
            "unroll": (tile.unroll // 2, tile.unroll * 2),
            "split_k": (1, tile.split_k // 2, tile.split_k * 2),
            "num_warps": (tile.num_warps // 2, tile.num_warps * 2),
            "num_stages": (tile.num_stages - 1, tile.num_stages + 1),
            "group_m": (1, 16),
            "swap": (not tile.swap,),
        }.items():
            for value in (getattr(tile, name), *values):
                try:
                    tried[replace(tile, **{name: value})] = None
                except ValueError:
                    continue  # a neighbour that no kernel can have
    return list(tried)


def _tuned(arch: str, problem: Problem, peer: Vllm | None, clock: Clock, notice: Callable[[str], None]) -> Tuned:
    """The fastest tile for a problem, timed by turns with the kernel that vLLM would choose, if that is here."""
    m, n, k = problem.sizes
    expected = problem.reference()
    times: dict[Tile, float] = {}
    failed = 0
    for tile in candidates(arch, m, n, k):
        try:
            result = problem.ours(tile)
        except Exception as error:  # noqa: BLE001 - whatever the compiler or the driver says of a tile too large
            failed += 1
            notice(f"  {tile}: {type(error).__name__}")
            continue
        check(result, expected, f"tile {tile}'s")
        times[tile] = statistics.median(race({"w8a8": lambda tile=tile: problem.ours(tile)}, clock, 3)["w8a8"])  # type: ignore[misc]
    best = sorted(times, key=lambda tile: times[tile])[:3]
    contenders: dict[str, Work] = {str(tile): lambda tile=tile: problem.ours(tile) for tile in best}  # type: ignore[misc]
    choice = "cutlass" if _takes_cutlass(arch) else "vllm"
    rivals = {name: work for name, work in _vllms(arch, problem, peer).items() if name == choice}
    contenders |= _able(rivals, problem, notice)
    medians = {name: statistics.median(ms) for name, ms in race(contenders, clock, _TUNING_RUNS).items()}
    tile = min(best, key=lambda tile: medians[str(tile)])
    notice(f"{m} x {n} x {k}: {tile}, {medians[str(tile)]:.3f} ms, of {len(times)} tiles; {failed} did not compile")
    return Tuned(m, n, k, tile, medians[str(tile)], medians.get(choice))


def show(result: GemmResult, say: Callable[[Any], None]) -> None:
    """The tables for a person; `say` prints what Rich can."""
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
