"""Which tile computes an INT8 matrix product: small tables per architecture and band of M, with the reason for each.

A table holds the tiles of one family of architectures, from few tokens to many; `choose` takes the first whose band
the tokens fit, and an architecture without a table of its own takes its nearest relative's. What was shipped was chosen
without the cards: by what the compiled inner loops are made of (`w8a8 bench compile` shows that), never by timing.
`w8a8 bench gemm --tune` times tiles on the card that is there and stores the best in the user's cache; `choose` takes
those first.
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

_WAVES = 4
"""Waves per scheduler that split-K aims at: enough loads in flight to keep the memory busy."""
_LARGEST_FILE = 4 << 20
"""Bytes of a stored tuning that are read at most."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of `int8_gpu`'s kernels. Raises ValueError for sizes that they cannot have.

    A program computes `block_m` tokens x `block_n` output channels, in steps of `unroll` times `block_k` inputs;
    `group_m` rows of tiles share the cache; `split_k` programs share one dot product; with `swap` the weights take the
    rows of the matrix instruction. `num_warps`, `num_stages` and (AMD's) `kpack` are the compiler's.
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

    def __post_init__(self) -> None:
        """Refuse what no kernel could be compiled for."""
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
        if type(self.swap) is not bool:
            raise ValueError(f"swap must be true or false, not {self.swap!r}")

    def __str__(self) -> str:
        """As tables show it: `128x128x64`, then what is not as usual, as in `unroll4 swap`."""
        size = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return " ".join([size, *(_brief(f.name, getattr(self, f.name)) for f in fields(self)[3:] if self._says(f))])

    def _says(self, field: Field[Any]) -> bool:
        return bool(getattr(self, field.name) != field.default)

    def compiler_options(self) -> dict[str, int]:
        """What Triton's compiler takes; `kpack` is AMD's alone and given only where it says something."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.kpack == 1 else {**options, "kpack": self.kpack}


def _brief(name: str, value: int) -> str:
    """`split2` for `split_k=2`, `swap` for `swap=True`."""
    word = name.removeprefix("num_").removesuffix("_k").removesuffix("_m")
    return word if value is True else f"{word}{value}"


@dataclass(frozen=True, slots=True)
class Family:
    """Tiles of related architectures: (most tokens, tile) in order, and the `schedulers` of their largest card."""

    schedulers: int
    bands: tuple[tuple[float, Tile], ...]


_MANY = math.inf

FAMILIES = {
    # RDNA3. An operand of `v_wmma_i32_16x16x16_iu8` is 16 bytes of a row per lane, both halves of a wave alike: weights
    # go through LDS, half a load and half a store, but a whole LDS read, for each.
    "gfx11": Family(
        192,  # 96 compute units with 2 SIMDs (gfx1100)
        (
            # Two matrix instructions for each weight operand read from LDS. 16 rows would waste none for M <= 16 (0.24
            # of all instructions instead of 0.30), but matrix units idle there anyway. One wave per program needs no
            # barriers, so that, unrolled, it loads the next step while it multiplies; 7 waves fit a SIMD.
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
    # Hopper: `wgmma` takes 64 rows per warp group straight from shared memory, and as few as 8 columns: few tokens are
    # the columns, weights the rows. Steps of 256 bytes are two cache lines of each row.
    "sm_9": Family(
        528,  # 132 multiprocessors with 4 schedulers
        (
            (16, Tile(16, 64, 256, swap=True, num_stages=3)),
            (32, Tile(32, 64, 256, swap=True, num_stages=3)),
            (64, Tile(64, 128, 128, swap=True, num_stages=4)),
            # Two programs per multiprocessor: one's epilogue beside the other's loop.
            (1024, Tile(128, 128, 128, num_stages=3)),
            # Fewer bytes per operation, once there are tiles enough for all.
            (_MANY, Tile(128, 256, 128, num_warps=8, num_stages=3)),
        ),
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
"""By how the names of their architectures begin."""

SAFE = Family(1, ((16, Tile(16, 64, 64)), (_MANY, Tile(64, 64, 64))))
"""What any target can run: for architectures without a relative here, and for Triton's interpreter."""


@cache
def architecture(device: torch.device | str) -> str:
    """The GPU's architecture as compilers call it (`gfx1100`, `sm_90`); `cpu` for what is no GPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return "cpu"
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def family(arch: str) -> Family:
    """The tables for `arch`, its nearest relative's, or the safe ones."""
    known = [name for name in FAMILIES if arch.startswith(name)]
    # sm_100 begins like sm_10, not like sm_1; gfx90a like gfx9, gfx1100 like gfx11.
    return FAMILIES[max(known, key=len)] if known else SAFE


@lru_cache(maxsize=1 << 14)
def choose(arch: str, m: int, n: int, k: int) -> Tile:
    """The tile for `m` tokens, `n` output channels and `k` inputs: as tuned on this machine, else as shipped."""
    tuned = [t for t in stored(arch) if (t.n, t.k) == (n, k) and t.m >= m]
    return min(tuned, key=lambda t: t.m).tile if tuned else shipped(arch, m, n, k)


def shipped(arch: str, m: int, n: int, k: int) -> Tile:
    """The tile that the tables here say."""
    tables = family(arch)
    tile = next(tile for most, tile in tables.bands if m <= most)
    return replace(tile, split_k=_splits(tile, m, n, k, tables.schedulers))


def _splits(tile: Tile, m: int, n: int, k: int, schedulers: int) -> int:
    """How many programs shall share a dot product: as many as fill the card, if each has some four steps to do, and if
    the partial sums, 4 bytes written and 4 read, stay below a quarter of the weight's bytes."""
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    fill = schedulers * _WAVES // tile.num_warps // tiles
    return max(1, min(fill, k // (4 * tile.block_k * tile.unroll), k // (32 * m), 256))


# --- what `bench gemm --tune` stored ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best tile found for up to `m` tokens, `n` outputs and `k` inputs: its milliseconds, and those of the kernel
    that vLLM would choose by itself, if that was timed."""

    m: int
    n: int
    k: int
    tile: Tile
    ms: float
    vllm_ms: float | None


def store_path(arch: str) -> Path:
    """Where the tuning for `arch` lies: in the user's cache folder."""
    if not re.fullmatch(r"cpu|gfx[0-9a-f]+|sm_[0-9]+", arch):
        raise ValueError(f"{arch!r} is no architecture")
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "w8a8" / "tiles" / f"{arch}.json"


def store(arch: str, tuned: Sequence[Tuned]) -> Path:
    """Keep `tuned`, and what was kept before for other shapes; returns the file. It counts from now on."""
    path = store_path(arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {(t.m, t.n, t.k): t for t in (*stored(arch), *tuned)}
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"tuned": [asdict(t) for t in kept.values()]}, indent=1), encoding="utf-8")
    temporary.replace(path)
    stored.cache_clear()
    choose.cache_clear()
    return path


@cache
def stored(arch: str) -> tuple[Tuned, ...]:
    """What was stored for `arch`. A file that is not such a store is warned of, and left aside."""
    path = store_path(arch)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"larger than {_LARGEST_FILE} bytes")
        return tuple(_tuned(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["tuned"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        warnings.warn(
            f"{path} is no stored tuning ({error}); the shipped tiles are used. "
            "`w8a8 bench gemm --tune` makes it anew, once it is deleted.",
            stacklevel=2,
        )
        return ()


def _tuned(entry: Any) -> Tuned:
    """One stored entry. Raises ValueError, TypeError or KeyError for what is none."""
    tuned = Tuned(**{**entry, "tile": Tile(**entry["tile"])})
    times = (tuned.ms,) if tuned.vllm_ms is None else (tuned.ms, tuned.vllm_ms)
    if not all(type(size) is int and size > 0 for size in (tuned.m, tuned.n, tuned.k)):
        raise ValueError("sizes must be positive")
    if not all(type(ms) is float and 0 < ms < math.inf for ms in times):
        raise ValueError("milliseconds must be positive")
    return tuned


def faster(arch: str) -> bool:
    """Whether a tuning on this machine measured these kernels to be faster than vLLM's own choice on `arch`, in the
    geometric mean over its shapes. Without one nobody knows, and the answer is no."""
    ratios = [t.vllm_ms / t.ms for t in stored(arch) if t.vllm_ms is not None]
    return bool(ratios) and math.fsum(map(math.log, ratios)) > 0
