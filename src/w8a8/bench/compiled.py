"""`w8a8 bench compile`: compile the INT8 kernels for GPUs that are not here, and show their inner loops.

Triton compiles for any of its targets on any machine. The launch code of this project, and of vLLM's Triton kernel if
a vLLM is installed, runs as on a user's card, with tensors that have shapes but no data, and with a driver that
compiles for the wanted architecture and launches nothing. So both kernels get the specialisations (alignment, tensors
below 2 GiB, constants) that their users get. Then the assembly is read:

- the inner loop is the shortest one with matrix instructions. `density` is their share of its instructions; `useful`
  is the density without matrix instructions for rows of a tile that no token fills;
- `load` is the narrowest vector load from global memory in that loop, in bits per lane;
- `waves` is the occupancy that registers and shared memory allow: waves per SIMD (AMD), warps per scheduler (NVIDIA);
- `spills` are the registers that did not fit and go through memory;
- `cycles` is the time that LLVM's machine-code analyzer, if one is installed and knows the target, gives for one pass
  of a lone wave through the loop. It models neither memory nor other waves, and its versions disagree: use it to
  compare only.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w8a8.bench.assembly import Loop, find_analyzer, read
from w8a8.bench.model import MLP_SHAPES
from w8a8.bench.targets import ARCHITECTURES, machine, require_triton, target
from w8a8.bench.vllm_kernel import Vllm, find_vllm

if TYPE_CHECKING:
    from w8a8.kernels.gpu.tiles import Tile

TOKENS = (1, 16, 32, 64, 128, 256, 1024, 4096)


@dataclass(frozen=True, slots=True)
class Row:
    """One product: `tokens` x `inputs` times `inputs` x `outputs`, by one `kernel` (`w8a8` or `vllm`) on `arch`."""

    arch: str
    tokens: int
    outputs: int
    inputs: int
    kernel: str
    tile: str
    rows: int
    loop: Loop

    @property
    def useful(self) -> float:
        """Density, without the share of the tiles' rows that no token fills."""
        return self.loop.density * self.tokens / (-(-self.tokens // self.rows) * self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "density": self.loop.density, "useful": self.useful}


@dataclass(frozen=True, slots=True)
class CompileResult:
    """The table, and the versions that made it; `vllm` and `analyzer` are None where there is none."""

    triton: str
    vllm: str | None
    analyzer: str | None
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}


def bench(
    archs: Sequence[str] = ARCHITECTURES,
    *,
    tokens: Sequence[int] = TOKENS,
    shapes: Sequence[tuple[int, int]] = MLP_SHAPES,
    vllm: Path | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> CompileResult:
    """Compile the kernels for every architecture, shape [out, in] and number of tokens; vLLM's kernel beside them.

    `vllm` is a folder or a Python that has vLLM; it defaults to this environment's vLLM, if any. Raises
    MissingExtraError without torch and Triton, UsageError for an unknown architecture or a `vllm` without vLLM.
    """
    require_triton()
    import triton

    for arch in archs:
        machine(arch)
    peer = find_vllm(vllm, notice)
    analyzer = find_analyzer()
    rows: list[Row] = []
    for arch in archs:
        notice(f"compiling for {arch}")
        for outputs, inputs in shapes:
            for count in tokens:
                rows.append(ours(arch, count, outputs, inputs))
                if peer is not None:
                    rows.append(theirs(peer, arch, count, outputs, inputs))
    return CompileResult(triton.__version__, peer.version if peer else None, analyzer, tuple(rows))


def ours(arch: str, tokens: int, outputs: int, inputs: int, tile: "Tile | None" = None) -> Row:
    """Compile this project's kernel with `tile`, by default the tables' choice."""
    import torch

    from w8a8.kernels.gpu.int8 import scaled_int8_mm
    from w8a8.kernels.gpu.tiles import shipped

    tile = tile or shipped(arch, tokens, outputs, inputs)
    x, weight, x_scale, weight_scale = _shapes(tokens, outputs, inputs)
    with target(arch) as kernels:
        scaled_int8_mm(x, weight, x_scale, weight_scale, None, torch.bfloat16, tile=tile)
    return Row(arch, tokens, outputs, inputs, "w8a8", str(tile), tile.block_m, read(arch, kernels[0]))


def theirs(peer: Vllm, arch: str, tokens: int, outputs: int, inputs: int) -> Row:
    """Compile vLLM's Triton kernel, called as by vLLM's linear layer: the weight [out, in] is a transposed view."""
    import torch

    x, weight, x_scale, weight_scale = _shapes(tokens, outputs, inputs)
    with target(arch) as kernels:
        peer.module.triton_scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=torch.bfloat16)
    constants = dict(zip(kernels[0].src.fn.arg_names, _constants(kernels[0]), strict=True))
    m, n, k = (constants[f"BLOCK_SIZE_{letter}"] for letter in "MNK")
    return Row(arch, tokens, outputs, inputs, "vllm", f"{m}x{n}x{k}", m, read(arch, kernels[0]))


def _constants(kernel: Any) -> list[Any]:
    """Return a compiled kernel's constants in the order of its arguments; None for arguments that are not constant."""
    return [kernel.src.constants.get((position,)) for position in range(len(kernel.src.fn.arg_names))]


def _shapes(tokens: int, outputs: int, inputs: int) -> tuple[Any, Any, Any, Any]:
    """Make codes and scales of `tokens` tokens and of a weight [outputs, inputs]: shapes and dtypes without data."""
    import torch

    def codes(rows: int) -> Any:
        return torch.empty(rows, inputs, dtype=torch.int8, device="meta")

    def scales(rows: int) -> Any:
        return torch.empty(rows, 1, device="meta")

    return codes(tokens), codes(outputs), scales(tokens), scales(outputs)


def show(result: CompileResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    from w8a8.terminal.output import plain_table

    peer = f"vLLM {result.vllm}" if result.vllm else "no vLLM here, so its column is missing"
    say(f"Triton {result.triton}; {peer}; {result.analyzer or 'no llvm-mca here, so no cycles'}")
    table = plain_table(
        *("arch", "out x in", "tokens", "kernel", "tile", "matrix / all", "density", "useful", "load", "VGPRs"),
        *("shared", "waves", "spills", "cycles"),
        left=2,
    )
    for row in result.rows:
        loop = row.loop
        table.add_row(
            row.arch,
            f"{row.outputs} x {row.inputs}",
            f"{row.tokens}",
            row.kernel,
            row.tile,
            f"{loop.matrix}/{loop.instructions}",
            f"{loop.density:.3f}",
            f"{row.useful:.3f}",
            f"{loop.load_bits}",
            f"{loop.registers}",
            f"{loop.shared}",
            f"{loop.waves}",
            f"{loop.spills}",
            "" if loop.cycles is None else f"{loop.cycles:.0f}",
        )
    say(table)
