"""Tuning: the fastest tile for each product, found by timing candidates on the GPU that is here.

Compiling takes most of the time, so all kernels are compiled before, on all cores, into Triton's cache.
"""

import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

from w8a8.bench.contenders import Problem, able, check, takes_cutlass, vllm_kernels
from w8a8.bench.contest import Clock, Work, race
from w8a8.bench.targets import target
from w8a8.bench.vllm_kernel import Vllm
from w8a8.kernels.gpu import tiles
from w8a8.kernels.gpu.int8 import scaled_int8_mm
from w8a8.kernels.gpu.tiles import Tile, Tuned

_FINAL_RUNS = 7
_FINALISTS = 3


def candidates(arch: str, m: int, n: int, k: int) -> list[Tile]:
    """Return the tiles to try: the shipped one, its family's for similar M, and neighbours that differ in one field."""
    first = tiles.shipped(arch, m, n, k)
    table = tiles.family(arch).bands
    own = next(band for most, *band in table if m <= most)
    near = [band[0] for _, *band in table if first.block_m / 2 <= band[0].block_m <= first.block_m * 2]
    tried = {first: None}
    for tile in (first, *(replace(tile, split_k=first.split_k) for tile in (*own, *near))):
        for name, values in {
            "block_n": (tile.block_n // 2, tile.block_n * 2),
            "block_k": (tile.block_k // 2, tile.block_k * 2),
            "unroll": (tile.unroll // 2, tile.unroll * 2),
            "split_k": (1, tile.split_k // 2, tile.split_k * 2),
            "num_warps": (tile.num_warps // 2, tile.num_warps * 2),
            "num_stages": (tile.num_stages - 1, tile.num_stages + 1),
            "group_m": (1, 16) if m > tile.block_m else (),
            "swap": (not tile.swap,),
            "masked": (not tile.masked,) if m < tile.block_m else (),
        }.items():
            for value in (getattr(tile, name), *values):
                try:
                    tried[replace(tile, **{name: value})] = None
                except ValueError:
                    continue  # a neighbour that no kernel can have
    return list(tried)


def compile_ahead(arch: str, sizes: Iterable[tuple[int, int, int]], workers: int | None = None) -> int:
    """Compile all candidates for products of the `sizes` (M, N, K) into Triton's cache; return how many there are.

    Sizes that differ by multiples of 16 share kernels. `workers` processes, by default one a core, need no GPU.
    """
    kernels: dict[tuple[Tile, bool, bool], tuple[Tile, int]] = {}
    for m, n, k in sizes:
        for tile in candidates(arch, m, n, k):
            tail = k % (tile.block_k * tile.unroll) != 0
            kernels.setdefault((replace(tile, split_k=1), tile.split_k > 1, tail), (tile, k))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_compile, arch), kernels.values()))
    return len(kernels)


def _compile(arch: str, kernel: tuple[Tile, int]) -> None:
    """Compile a product of K inputs for `arch`, if it can be; `tune` says of a tile that it cannot."""
    import torch

    tile, k = kernel
    x, scales = torch.empty(16, k, dtype=torch.int8, device="meta"), torch.empty(16, 1, device="meta")
    with target(arch), suppress(Exception):
        scaled_int8_mm(x, x, scales, scales, None, torch.bfloat16, tile=tile)


def tune(arch: str, problem: Problem, peer: Vllm | None, clock: Clock, notice: Callable[[str], None]) -> Tuned:
    """Find the fastest tile for a problem; the kernel that vLLM would choose races it, if that is here."""
    m, n, k = problem.sizes

    # 1) Time every candidate that compiles, and check its result.
    expected = problem.reference()
    times: dict[Tile, float] = {}
    failed = 0
    for tile in candidates(arch, m, n, k):
        try:
            result = problem.ours(tile)
        except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything for a tile that is too large
            failed += 1
            notice(f"  {tile}: {type(error).__name__}")
            continue
        check(result, expected, f"tile {tile}'s")
        times[tile] = statistics.median(race({"w8a8": _ours(problem, tile)}, clock, 3)["w8a8"])

    # 2) Race the fastest, and vLLM's choice, once more.
    best = sorted(times, key=lambda tile: times[tile])[:_FINALISTS]
    contenders = {str(tile): _ours(problem, tile) for tile in best}
    choice = "cutlass" if takes_cutlass(arch) else "vllm"
    rivals = {name: work for name, work in vllm_kernels(arch, problem, peer).items() if name == choice}
    contenders |= able(rivals, problem, notice)
    medians = {name: statistics.median(ms) for name, ms in race(contenders, clock, _FINAL_RUNS).items()}
    tile = min(best, key=lambda tile: medians[str(tile)])
    notice(f"{m} x {n} x {k}: {tile}, {medians[str(tile)]:.3f} ms, of {len(times)} tiles; {failed} did not compile")
    return Tuned(m, n, k, tile, medians[str(tile)], medians.get(choice))


def _ours(problem: Problem, tile: Tile) -> Work:
    return lambda: problem.ours(tile)
