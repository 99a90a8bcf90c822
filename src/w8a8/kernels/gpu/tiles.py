"""Which tile computes an INT8 matrix product: small tables per architecture and band of M, with a reason for each tile.

A table holds the tiles of one family of architectures, from few tokens to many. `choose` takes the first tile whose
band holds the tokens; an architecture without a table takes its nearest relative's. Hopper's tiles were timed on an
H200 (docs/kernels.md). All others were chosen without the cards: by the instructions in the compiled inner loops, which
`w8a8 bench compile` shows.
`w8a8 bench gemm --tune` times tiles on this machine's card and stores the best in the user's cache; `choose` takes
stored tiles first.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from w8a8.errors import UnreadableError, first_line
from w8a8.reading import read_json

_WAVES = 4
"""Waves per scheduler that split-K aims at: enough loads in flight to keep the memory busy."""
_LARGEST_FILE = 4 << 20
"""Bytes of the largest tuning file that is read."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of the kernels in `gpu/int8.py`. Raises ValueError for sizes that they cannot have.

    A program computes `block_m` tokens x `block_n` output channels, in steps of `unroll` times `block_k` inputs;
    `group_m` rows of tiles share the cache; `split_k` programs share one dot product; with `swap` the weights take the
    rows of the matrix instruction; with `masked` nothing is read for rows that hold no token. `num_warps`, `num_stages`
    and (for AMD) `kpack` go to the compiler.
    """

    block_m: int
    block_n: int
    block_k: int
    unroll: int = 1
    group_m: int = 8
    split_k: int = 1
    swap: bool = False
    num_warps: int = 4
    num_stages: int = 2
    kpack: int = 1
    masked: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that no kernel can be compiled for."""
        limits = {
            "block_m": (16, 256),
            "block_n": (16, 512),
            "block_k": (32, 512),
            "unroll": (1, 8),
            "group_m": (1, 64),
            "split_k": (1, 256),
            "num_warps": (1, 16),
            "num_stages": (1, 8),
            "kpack": (1, 2),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be {least} to {most}, not {value!r}")
            if (name.startswith("block") or name == "num_warps") and value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value}")
        for name in ("swap", "masked"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")

    def __str__(self) -> str:
        """The name in tables: `128x128x64`, then every other field that is not the default, e.g. `unroll4 swap`."""
        size = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return " ".join([size, *(_brief(f.name, getattr(self, f.name)) for f in fields(self)[3:] if self._says(f))])

    def _says(self, field: Field[Any]) -> bool:
        return bool(getattr(self, field.name) != field.default)

    def compiler_options(self) -> dict[str, int]:
        """Options for Triton's compiler; `kpack` exists for AMD only and is left out where it is 1."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.kpack == 1 else {**options, "kpack": self.kpack}


def _brief(name: str, value: int) -> str:
    """`split2` for `split_k=2`, `swap` for `swap=True`."""
    word = name.removeprefix("num_").removesuffix("_k").removesuffix("_m")
    return word if value is True else f"{word}{value}"


@dataclass(frozen=True, slots=True)
class Family:
    """Tiles of related architectures: `bands` of (most tokens, tiles) in order; `schedulers` of their largest card.

    `shared` bytes of a multiprocessor, where tiles were timed on a card: then a band may have several tiles, of which
    the one with the least load is taken, and its pipeline takes the shared memory that there is. 0 where they were not:
    a band has one tile, with the stages that its compiled loop wants.
    """

    schedulers: int
    bands: tuple[tuple[float, *tuple[Tile, ...]], ...]
    shared: int = 0


_MANY = math.inf

FAMILIES = {
    # RDNA3. An operand of `v_wmma_i32_16x16x16_iu8` is 16 bytes of a row per lane, the same in both halves of a wave.
    # Weights go through LDS: each operand takes half a load and half a store, but a whole LDS read.
    "gfx11": Family(
        192,  # 96 compute units with 2 SIMDs (gfx1100)
        (
            # Two matrix instructions for each weight operand read from LDS (0.30 of all instructions). 16 rows would
            # waste none for M <= 16 (but only 0.24), and matrix units idle there anyway. One wave per program needs no
            # barriers: unrolled, it loads the next step while it multiplies. 7 waves fit a SIMD.
            (32, Tile(32, 64, 64, unroll=4, swap=True, num_warps=1, num_stages=1)),
            # Each wave 64 x 64: 16 matrix instructions for 8 operands. Steps of 128 would not fit the registers.
            (64, Tile(64, 256, 64)),
            # The same, in steps of 128 for half the barriers: 239 registers, none spilled.
            (_MANY, Tile(128, 128, 128)),
        ),
    ),
    # RDNA4: operands are no longer doubled, so LDS reads are halved and 16 rows pay.
    "gfx12": Family(
        128,  # 64 compute units with 2 SIMDs (gfx1201)
        (
            (16, Tile(16, 128, 64, unroll=4, swap=True, num_warps=1, num_stages=1)),
            (32, Tile(32, 64, 64, unroll=4, swap=True, num_warps=1, num_stages=1)),
            (64, Tile(64, 256, 64)),
            (_MANY, Tile(128, 128, 128)),
        ),
    ),
    # CDNA3. kpack=2 makes LDS reads 16 bytes wide.
    "gfx9": Family(
        1216,  # 304 compute units with 4 SIMDs (gfx942)
        (
            (16, Tile(16, 64, 256, swap=True, num_warps=2, kpack=2)),
            (32, Tile(32, 64, 256, swap=True, kpack=2)),
            (64, Tile(64, 128, 128, kpack=2)),
            (2048, Tile(128, 128, 128, kpack=2)),
            # Half the LDS reads per matrix instruction; fewer tokens would leave compute units without a tile.
            (_MANY, Tile(256, 256, 64, num_warps=8, kpack=2)),
        ),
    ),
    # Ampere and Ada: `mma.m16n8k32`, `cp.async`. With one dot per step Triton prefetches operands byte by byte, and
    # spills registers; with two it does not.
    "sm_8": Family(
        432,  # 108 multiprocessors with 4 schedulers (sm_80)
        (
            (16, Tile(16, 64, 128, unroll=2, swap=True, num_stages=3)),
            (32, Tile(32, 64, 128, unroll=2, num_stages=3)),
            (64, Tile(64, 64, 64, unroll=2, num_stages=3)),
            (_MANY, Tile(128, 128, 64, unroll=2, num_stages=3)),
        ),
    ),
    # Hopper, timed on an H200: `wgmma` takes 64 rows per warp group straight from shared memory, and as few as 8
    # columns: few tokens are the columns, weights the rows. With few tokens a deep pipeline keeps the memory busier
    # than programs that share dot products. Two programs of 128 x 128 per multiprocessor, one's epilogue beside
    # another's loop, beat one of 128 x 256 by a quarter.
    "sm_9": Family(
        528,  # 132 multiprocessors with 4 schedulers
        (
            (16, Tile(16, 64, 128, swap=True, masked=True)),
            (32, Tile(32, 64, 128, swap=True, masked=True)),
            (64, Tile(64, 64, 128, swap=True), Tile(64, 128, 128, swap=True)),
            (
                256,
                Tile(128, 128, 128, swap=True),
                Tile(128, 64, 128, swap=True),
                Tile(64, 64, 128, swap=True),
                Tile(128, 128, 128, swap=True, split_k=3),
            ),
            (_MANY, Tile(128, 128, 128, group_m=16), Tile(128, 64, 128, group_m=16, swap=True)),
        ),
        227 << 10,
    ),
    # Blackwell for data centres: `tcgen05.mma kind::i8`, accumulating in tensor memory.
    "sm_10": Family(
        592,  # 148 multiprocessors with 4 schedulers
        (
            (16, Tile(16, 64, 128, swap=True, num_stages=4)),
            (32, Tile(32, 64, 128, swap=True, num_stages=4)),
            (64, Tile(64, 128, 128, swap=True, num_stages=4)),
            (1024, Tile(128, 128, 128, num_stages=3)),
            (_MANY, Tile(128, 256, 128, num_warps=8, num_stages=3)),
        ),
    ),
    # Blackwell for desks: Ampere's `mma.m16n8k32` and 99 KiB of shared memory, of which two programs take their halves.
    "sm_12": Family(
        680,  # 170 multiprocessors with 4 schedulers
        (
            (16, Tile(16, 64, 256, swap=True, num_stages=3)),
            (32, Tile(32, 64, 256, swap=True, num_stages=3)),
            (64, Tile(64, 128, 128, num_stages=3)),
            (_MANY, Tile(128, 128, 64, num_stages=3)),
        ),
    ),
}
"""Tables by the beginning of the architecture's name."""

SAFE = Family(1, ((16, Tile(16, 64, 64)), (_MANY, Tile(64, 64, 64))))
"""Tiles that any target can run: for architectures without a relative here, and for Triton's interpreter."""


@cache
def architecture(device: torch.device | str) -> str:
    """Return the GPU's architecture as compilers name it (`gfx1100`, `sm_90`); `cpu` for any other device."""
    device = torch.device(device)
    if device.type != "cuda":
        return "cpu"
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def family(arch: str) -> Family:
    """Return the table for `arch`, else its nearest relative's, else the safe one."""
    known = [name for name in FAMILIES if arch.startswith(name)]
    # sm_100 begins like sm_10, not like sm_1; gfx90a like gfx9, gfx1100 like gfx11.
    return FAMILIES[max(known, key=len)] if known else SAFE


@lru_cache(maxsize=1 << 14)
def choose(arch: str, m: int, n: int, k: int) -> Tile:
    """Return the tile for `m` tokens, `n` output channels and `k` inputs: tuned on this machine, else shipped."""
    tuned = [t for t in stored(arch) if (t.n, t.k) == (n, k) and t.m >= m]
    return min(tuned, key=lambda t: t.m).tile if tuned else shipped(arch, m, n, k)


def shipped(arch: str, m: int, n: int, k: int) -> Tile:
    """Return the tile from the tables in this file."""
    table = family(arch)
    tiles = next(tiles for most, *tiles in table.bands if m <= most)
    if not table.shared:
        return replace(tiles[0], split_k=_splits(tiles[0], m, n, k, table.schedulers))
    units = table.schedulers // 4
    whole = [tile for tile in tiles if tile.split_k == 1 or k >= tile.split_k * max(24 * m, 4 * tile.block_k)]
    tile = min(whole, key=lambda tile: _load(tile, m, n, k, units))
    return _deep(tile, table.shared // -(-_programs(tile, m, n) // units))


def _programs(tile: Tile, m: int, n: int) -> int:
    return -(-m // tile.block_m) * -(-n // tile.block_n) * tile.split_k


def _load(tile: Tile, m: int, n: int, k: int, units: int) -> float:
    """Return the multiplications of a multiprocessor, of `units`, that has many programs, and all else as so many.

    It has its share of the programs, or what the busiest one has, in between. A row of an operand costs as much as 36
    multiplications, a partial sum as much as 10: fitted to an H200's times of 848 kernels. The tile of the least
    load misses the best on 78 products by 1.5% in the geometric mean (tests/kernels/gpu/h200.json).
    """
    share = _programs(tile, m, n) / units
    programs = 0.7 * math.ceil(share) + 0.3 * max(share, 1)
    step = tile.block_m * tile.block_n + 36 * (tile.block_m + tile.block_n)
    return programs * step * k / tile.split_k + (10 * m * n * tile.split_k if tile.split_k > 1 else 0)


def _deep(tile: Tile, shared: int) -> Tile:
    """Return the tile with a pipeline for `shared` bytes: 3 to 6 stages, twice as long if four such stages fit."""
    step = (tile.block_m + tile.block_n) * tile.block_k
    if shared // (2 * step) >= 4:
        return replace(tile, block_k=2 * tile.block_k, num_stages=min(shared // (2 * step), 6))
    return replace(tile, num_stages=min(max(shared // step, 3), 6))


def _splits(tile: Tile, m: int, n: int, k: int, schedulers: int) -> int:
    """Return how many programs share a dot product: as many as fill the card.

    Each program still does at least four steps, and the partial sums (4 bytes written and 4 read for each) stay below a
    quarter of the weight's bytes.
    """
    fill = schedulers * _WAVES // tile.num_warps // _programs(tile, m, n)
    return max(1, min(fill, k // (4 * tile.block_k * tile.unroll), k // (32 * m), 256))


# --- the tuning that `bench gemm --tune` stores -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best tile found for up to `m` tokens, `n` outputs and `k` inputs, and its milliseconds `ms`.

    `vllm_ms` are those of the kernel that vLLM itself would choose; None where that was not timed.
    """

    m: int
    n: int
    k: int
    tile: Tile
    ms: float
    vllm_ms: float | None


def store_path(arch: str) -> Path:
    """Return the file of the tuning for `arch`, in the user's cache folder."""
    if not re.fullmatch(r"cpu|gfx[0-9a-f]+|sm_[0-9]+", arch):
        raise ValueError(f"{arch!r} is no architecture's name, like gfx1100 or sm_90")
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "w8a8" / "tiles" / f"{arch}.json"


def store(arch: str, tuned: Sequence[Tuned]) -> Path:
    """Store `tuned` beside earlier entries of other shapes, and return the file; `choose` uses it from now on."""
    path = store_path(arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {(t.m, t.n, t.k): t for t in (*stored(arch), *tuned)}
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps({"tuned": [asdict(t) for t in kept.values()]}, indent=1), encoding="utf-8")
    temporary.replace(path)
    stored.cache_clear()
    choose.cache_clear()
    return path


@cache
def stored(arch: str) -> tuple[Tuned, ...]:
    """Return the tuning stored for `arch`. Warns of a file that is no valid tuning, and ignores it."""
    path = store_path(arch)
    if not path.exists():
        return ()
    try:
        return tuple(_tuned(entry) for entry in read_json(path, dict[str, Any], limit=_LARGEST_FILE)["tuned"])
    except (UnreadableError, ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"{path} is no stored tuning ({first_line(error)}), so the shipped tiles are used. "
            "Delete it; `w8a8 bench gemm --tune` writes a new one.",
            stacklevel=2,
        )
        return ()


def _tuned(entry: Any) -> Tuned:
    """Read one stored entry. Raises ValueError, TypeError or KeyError for an invalid one."""
    tuned = Tuned(**{**entry, "tile": Tile(**entry["tile"])})
    times = (tuned.ms,) if tuned.vllm_ms is None else (tuned.ms, tuned.vllm_ms)
    if not all(type(size) is int and size > 0 for size in (tuned.m, tuned.n, tuned.k)):
        raise ValueError("sizes must be positive")
    if not all(type(ms) is float and 0 < ms < math.inf for ms in times):
        raise ValueError("milliseconds must be positive")
    return tuned


def faster(arch: str) -> bool:
    """Whether a tuning on this machine found these kernels faster than vLLM's own choice on `arch`.

    The geometric mean over the tuning's shapes decides. Without a tuning the answer is no.
    """
    ratios = [t.vllm_ms / t.ms for t in stored(arch) if t.vllm_ms is not None]
    return bool(ratios) and math.fsum(map(math.log, ratios)) > 0
