"""`w8a8 bench compile`: the INT8 kernels compiled for GPUs that are not here, and what their inner loops are made of.

Triton compiles for any of its targets on any machine. So the launch code of this project, and of vLLM's Triton kernel
where a vLLM is installed, is run as on a user's card, with tensors that have shapes and no data, and with a driver that
compiles for the architecture asked for and launches nothing: both kernels get the specialisations (alignment, tensors
below 2 GiB, constants) that their users get. Then the assembly is read:

- the inner loop is the shortest one that holds matrix instructions; `density` is their share of its instructions, and
  `useful` what is left of that when rows of a tile that no token fills are not counted;
- `load` is the narrowest vector load from global memory in that loop, in bits per lane;
- `waves` is the occupancy that registers and shared memory allow: waves per SIMD (AMD), warps per scheduler (NVIDIA);
- `spills` are the registers that did not fit, and go through memory;
- `cycles` is what LLVM's machine-code analyzer, where one is installed and knows the target, says one pass through the
  loop takes a lone wave. It models neither memory nor other waves, and its versions disagree: compare, don't believe.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from w8a8.bench.quantize import HIDDEN, INTERMEDIATE
from w8a8.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from w8a8.kernels.gpu.tiles import Tile

ARCHITECTURES = ("gfx1100", "gfx1151", "gfx1201", "gfx942", "sm_80", "sm_90", "sm_100", "sm_120")
SHAPES = ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
"""[out, in] of Gemma 4 31B's gate_proj and up_proj, and of its down_proj."""
TOKENS = (1, 16, 32, 64, 128, 256, 1024, 4096)

_MATRIX = ("v_wmma_i32_16x16x16_iu8", "v_mfma_i32_", "IMMA", "IGMMA", "UTCIMMA")
_LABEL = re.compile(r"([.\w$]+):")
_BRANCH = re.compile(r"(?:s_c?branch\w*|BRA(?:\.U)?(?:\s+!?UP\d,)?)\s+([.\w$]+)")
_SASS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+([^;]+);")
_AMD_LOAD = re.compile(r"(?:buffer|global|flat)_load_(?:b(\d+)|dword(?:x(\d))?|[usi]\w+)")
_NVIDIA_LOAD = re.compile(r"(?:LDG|LDGSTS)\.E(?:\.(?!U8|S8|U16|S16)[A-Z]\w*)*(?:\.(U8|S8|U16|S16|64|128))?")
_VLLM_KERNEL = "model_executor/layers/quantization/compressed_tensors/triton_scaled_mm.py"


@dataclass(frozen=True, slots=True)
class Machine:
    """What limits occupancy: registers per SIMD (and how they are given out), shared memory, waves.

    `lanes` of a wave; `registers` per lane that a SIMD has; `granule` in which they are given; `waves` per SIMD at
    most; `shared` bytes of `simds` SIMDs together; `block` bytes that one workgroup may take.
    """

    lanes: int
    registers: int
    granule: int
    waves: int
    shared: int
    simds: int
    block: int

    def occupancy(self, registers: int, shared: int, warps: int) -> int:
        """Waves per SIMD of workgroups of `warps` waves with `registers` a lane and `shared` bytes a workgroup."""
        by_registers = self.registers // (-(-registers // self.granule) * self.granule)
        groups = self.shared // shared if shared else self.waves * self.simds
        return min(self.waves, by_registers, max(1, groups * warps // self.simds))


_RDNA = Machine(32, 1536, 24, 16, 128 << 10, 4, 64 << 10)  # a workgroup processor: two compute units
_CDNA3 = Machine(64, 512, 8, 8, 64 << 10, 4, 64 << 10)


def _sm(shared: int, warps: int) -> Machine:
    """A streaming multiprocessor with `shared` KiB, 1 of which each block takes for the system."""
    return Machine(32, 512, 8, warps // 4, shared << 10, 4, (shared - 1) << 10)


MACHINES = {
    "gfx11": _RDNA,
    "gfx12": _RDNA,
    "gfx9": _CDNA3,
    "sm_80": _sm(164, 64),
    "sm_8": _sm(100, 48),
    "sm_9": _sm(228, 64),
    "sm_10": _sm(228, 64),
    "sm_12": _sm(100, 48),
}
"""By the beginning of the architecture's name: AMD's ISA guides and LLVM's, NVIDIA's CUDA programming guide."""


def machine(arch: str) -> Machine:
    """The limits of `arch`. Raises UsageError for one that these kernels are not made for."""
    for prefix in sorted(MACHINES, key=len, reverse=True):
        if arch.startswith(prefix) and re.fullmatch(r"gfx\d{3}[0-9a-f]?|sm_\d{2,3}", arch):
            return MACHINES[prefix]
    raise UsageError(f"no INT8 kernels for {arch!r}; try one of {', '.join(ARCHITECTURES)}")


@dataclass(frozen=True, slots=True)
class Loop:
    """What one compiled kernel is made of; `tile` is its size in tokens x channels x inputs per step."""

    instruction: str
    matrix: int
    instructions: int
    load_bits: int
    registers: int
    shared: int
    waves: int
    spills: int
    cycles: float | None

    @property
    def density(self) -> float:
        """Matrix instructions per instruction."""
        return self.matrix / self.instructions


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
        """Density, less the share of rows of the tiles that no token fills."""
        return self.loop.density * self.tokens / (-(-self.tokens // self.rows) * self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "density": self.loop.density, "useful": self.useful}


@dataclass(frozen=True, slots=True)
class CompileResult:
    """The table, and with what it was made; `vllm` and `analyzer` are None where there is none."""

    triton: str
    vllm: str | None
    analyzer: str | None
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}


@dataclass(frozen=True, slots=True)
class Vllm:
    """An installed vLLM: its version, and its `triton_scaled_mm` with the module it lives in."""

    version: str
    module: ModuleType


def bench(
    archs: Sequence[str] = ARCHITECTURES,
    *,
    tokens: Sequence[int] = TOKENS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    vllm: Path | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> CompileResult:
    """Compile for every architecture, shape [out, in] and number of tokens what would run there; vLLM's beside it.

    `vllm` is a folder or a Python that has vLLM; without it, the one of this environment, if any. Raises
    MissingExtraError without torch and Triton, UsageError for an unknown architecture or where there is no vLLM.
    """
    import_triton()
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


def import_triton() -> None:
    """Raises MissingExtraError where torch or Triton is missing."""
    try:
        import torch  # noqa: F401
        import triton  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"the GPU kernels need torch and triton ({error}): pip install torch triton") from error


def ours(arch: str, tokens: int, outputs: int, inputs: int, tile: "Tile | None" = None) -> Row:
    """This project's kernel with `tile`, or with the one that the tables choose."""
    import torch

    from w8a8.kernels.gpu.int8 import scaled_int8_mm
    from w8a8.kernels.gpu.tiles import shipped

    tile = tile or shipped(arch, tokens, outputs, inputs)
    x, weight, x_scale, weight_scale = _shapes(tokens, outputs, inputs)
    with target(arch) as kernels:
        scaled_int8_mm(x, weight, x_scale, weight_scale, None, torch.bfloat16, tile=tile)
    return Row(arch, tokens, outputs, inputs, "w8a8", str(tile), tile.block_m, read(arch, kernels[0]))


def theirs(peer: Vllm, arch: str, tokens: int, outputs: int, inputs: int) -> Row:
    """vLLM's Triton kernel, called as its linear layer does: the weight [out, in] as a transposed view."""
    import torch

    x, weight, x_scale, weight_scale = _shapes(tokens, outputs, inputs)
    with target(arch) as kernels:
        peer.module.triton_scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=torch.bfloat16)
    constants = dict(zip(kernels[0].src.fn.arg_names, _constants(kernels[0]), strict=True))
    m, n, k = (constants[f"BLOCK_SIZE_{letter}"] for letter in "MNK")
    return Row(arch, tokens, outputs, inputs, "vllm", f"{m}x{n}x{k}", m, read(arch, kernels[0]))


def _constants(kernel: Any) -> list[Any]:
    """A compiled kernel's constants in the order of its arguments; None for what is none."""
    return [kernel.src.constants.get((position,)) for position in range(len(kernel.src.fn.arg_names))]


def _shapes(tokens: int, outputs: int, inputs: int) -> tuple[Any, Any, Any, Any]:
    """Codes and scales of that many tokens, and of a weight [outputs, inputs]: shapes and dtypes without data."""
    import torch

    def codes(rows: int) -> Any:
        return torch.empty(rows, inputs, dtype=torch.int8, device="meta")

    def scales(rows: int) -> Any:
        return torch.empty(rows, 1, device="meta")

    return codes(tokens), codes(outputs), scales(tokens), scales(outputs)


@contextmanager
def target(arch: str) -> Iterator[list[Any]]:
    """Within it, launching a Triton kernel compiles it for `arch`; yields the list that compiled kernels go into."""
    from triton import knobs
    from triton.runtime.driver import driver

    pretended = _Driver(arch)
    kernels: list[Any] = []

    def compiled(*, key: Any, fn: Any, **_: Any) -> None:
        kernels.append(fn.jit_function.device_caches[pretended][0][key])

    before = driver._active, knobs.runtime.jit_post_compile_hook
    driver.set_active(pretended)
    knobs.runtime.jit_post_compile_hook = compiled
    try:
        yield kernels
    finally:
        driver._active, knobs.runtime.jit_post_compile_hook = before


class _Driver:
    """Stands in for a GPU's driver; it is its own device, so that every use of it compiles afresh."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        lanes = machine(arch).lanes
        self._target = GPUTarget("hip", arch, lanes) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
        self.utils = self

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> Any:
        return self

    def get_current_stream(self, _device: Any) -> int:
        return 0

    def get_device_properties(self, _device: Any) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # `Loop.shared` says what it takes

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1 << 20

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None


def read(arch: str, kernel: Any) -> Loop:
    """What a kernel compiled for `arch` is made of, from its assembly."""
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers = _number(text, ".vgpr_count:")
        spills = _number(text, ".vgpr_spill_count:") + _number(text, ".sgpr_spill_count:")
        load = _AMD_LOAD
    else:
        text, usage = disassembled(kernel.asm["cubin"])
        registers, spills = _number(usage, "REG:"), (_number(usage, "STACK:") + _number(usage, "LOCAL:")) // 4
        load = _NVIDIA_LOAD
    body = inner_loop(text)
    matrix = [line for line in body if _matrix(line)]
    shared = int(kernel.metadata.shared)
    return Loop(
        instruction=next(word for word in matrix[0].split() if word.startswith(_MATRIX)),
        matrix=len(matrix),
        instructions=len(body),
        load_bits=min((_bits(found) for line in body if (found := load.search(line))), default=0),
        registers=registers,
        shared=shared,
        waves=machine(arch).occupancy(registers, shared, kernel.metadata.num_warps),
        spills=spills,
        cycles=_cycles(arch, body),
    )


def inner_loop(assembly: str) -> list[str]:
    """The instructions of the shortest loop that holds matrix instructions. Raises ValueError where there is none."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in assembly.splitlines():
        text = line.split(";")[0].split("//")[0].strip()
        if label := _LABEL.fullmatch(text):
            labels[label[1]] = len(instructions)
        elif text and not text.startswith("."):
            instructions.append(text)
            branch = _BRANCH.search(text)
            if branch and branch[1] in labels:
                loops.append(instructions[labels[branch[1]] :])
    loops = [loop for loop in loops if any(map(_matrix, loop))]
    if not loops:
        raise ValueError("this kernel has no loop with matrix instructions")
    return min(loops, key=len)


def _matrix(instruction: str) -> bool:
    return any(word.startswith(_MATRIX) for word in instruction.split())


def _bits(load: re.Match[str]) -> int:
    """Bits per lane of a load: of `buffer_load_b128`, `global_load_dwordx4` or `LDG.E.128`."""
    if load.re is _NVIDIA_LOAD:
        return {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}.get(load[1] or "", 32)
    if load[1]:
        return int(load[1])
    return 32 * int(load[2] or 1) if "dword" in load[0] else 8


def _number(text: str, key: str) -> int:
    return int(re.search(rf"{re.escape(key)}\s*(\d+)", text)[1])  # type: ignore[index]


def disassembled(cubin: bytes) -> tuple[str, str]:
    """A binary for NVIDIA as `cuobjdump`, which comes with Triton, shows it: its SASS, with addresses as labels, and
    the resources it takes."""
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = [
            subprocess.run([knobs.nvidia.cuobjdump.path, what, file.name], capture_output=True, text=True, check=True)
            for what in ("-sass", "-res-usage")
        ]
    lines = (_SASS.match(line) for line in shown[0].stdout.splitlines())
    sass = "\n".join(f"0x{int(line[1], 16):x}:\n{line[2]}" for line in lines if line)
    return sass, shown[1].stdout


@cache
def find_analyzer() -> str | None:
    """The newest `llvm-mca` on the PATH; Debian's carry their version in the name."""
    named = [f"llvm-mca-{version}" for version in range(40, 15, -1)]
    return next((name for name in (*named, "llvm-mca") if shutil.which(name)), None)


def _cycles(arch: str, body: Sequence[str]) -> float | None:
    """Cycles of one pass through an inner loop of `arch`; None where no analyzer has a model of it."""
    analyzer = find_analyzer()
    if analyzer is None or not arch.startswith("gfx"):
        return None
    passes = 100
    command = [analyzer, "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={arch}", f"-iterations={passes}", "-instruction-info=0"]
    code = "\n".join(line for line in body if not _BRANCH.search(line))
    done = subprocess.run(command, input=code, capture_output=True, text=True)  # it may not know the target, or crash
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    return int(found[1]) / passes if found and done.returncode == 0 and not done.stderr else None


def find_vllm(where: Path | None, notice: Callable[[str], None] = lambda _: None) -> Vllm | None:
    """vLLM's Triton kernel: of the folder or Python `where`, else of this environment, or None where that has no vLLM,
    of which `notice` is told.

    Only the one file is loaded, with stand-ins for the two helpers it imports: vLLM itself takes many seconds, and its
    own choice of a platform. Raises UsageError where `where` has no such file.
    """
    folder = _vllm_folder(where)
    if folder is None:
        notice("no vLLM here: its kernel is left out; --vllm names a folder or a Python that has one")
        return None
    version = re.search(r"__version__ = version = '([^']+)'", (folder / "_version.py").read_text(encoding="utf-8"))
    return Vllm(version[1] if version else "?", _load_alone(folder / _VLLM_KERNEL))


def _vllm_folder(where: Path | None) -> Path | None:
    """The package's folder."""
    if where is None:
        found = importlib.util.find_spec("vllm")
        return Path(found.origin).parent if found and found.origin else None
    if where.is_file():
        script = "import importlib.util as i; print(getattr(i.find_spec('vllm'), 'origin', ''))"
        done = subprocess.run([str(where), "-c", script], capture_output=True, text=True)
        folder = Path(done.stdout.strip()).parent
    else:
        folder = where if where.name == "vllm" else where / "vllm"
    if not (folder / _VLLM_KERNEL).is_file():
        raise UsageError(f"{where} is neither a Python nor a folder with a vLLM that has {_VLLM_KERNEL}")
    return folder


def _load_alone(path: Path) -> ModuleType:
    """The module at `path`, with stand-ins for what it imports of vLLM."""
    import triton
    import triton.language

    helpers = ModuleType("vllm.triton_utils")
    vars(helpers).update(tl=triton.language, triton=triton, use_tensor_descriptor=lambda *_: False)  # as on AMD, NVIDIA
    allocation = ModuleType("vllm.triton_utils.allocation")
    vars(allocation).update(set_triton_allocator=lambda _: None)
    stand_ins = {"vllm": ModuleType("vllm"), helpers.__name__: helpers, allocation.__name__: allocation}
    spec = importlib.util.spec_from_file_location("vllm_triton_scaled_mm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module


def show(result: CompileResult, say: Callable[[Any], None]) -> None:
    """The table for a person; `say` prints what Rich can."""
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
