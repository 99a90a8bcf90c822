"""`w8a8 bench sources`: time decoding of quantized weights on one core, against the libraries that define them.

A matrix in memory is decoded to BF16 by the source's decoder, in blocks as `quantize` reads them, and by the reference
with one thread, by turns. What counts is the processor time of the calling thread, so that others' work on the machine
does not; speed is bytes of the source's weights, scales left out, by the median. Where the reference is here, both
results are compared, bit for bit.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import TensorSpec, stream
from w8a8.errors import MissingExtraError, SelfCheckError
from w8a8.kernels.cpu.bits import BITS
from w8a8.sources import opening
from w8a8.sources.rows import ARRAYS
from w8a8.sources.view import LogicalTensor
from w8a8.terminal.output import plain_table

Arrays = Mapping[str, tuple[str, NDArray[Any]]]
"""Tensors of a layer by the last part of their names: safetensors dtype and bits."""

Decode = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One spelling: bytes of its weights, seconds of each turn, and those of the reference, if there is one."""

    spelling: str
    nbytes: int
    seconds: tuple[float, ...]
    reference: str
    reference_seconds: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the row with medians and the ratio, as JSON values."""
        theirs = self.nbytes / statistics.median(self.reference_seconds) / 1e9 if self.reference_seconds else None
        ours = self.nbytes / statistics.median(self.seconds) / 1e9
        return {**asdict(self), "gb_s": ours, "reference_gb_s": theirs, "ratio": theirs and ours / theirs}


@dataclass(frozen=True, slots=True)
class SourceResult:
    """The table, for matrices of `size` x `size` weights."""

    size: int
    rows: tuple[SourceRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        return {"size": self.size, "rows": [row.to_dict() for row in self.rows]}


def bench(*, runs: int, size: int = 4096, notice: Callable[[str], None] = lambda _: None) -> SourceResult:
    """Time every spelling `runs` times, with matrices of `size` x `size`.

    Raises `MissingExtraError` without torch or transformers, `SelfCheckError` where a result is not the reference's.
    """
    try:
        import torch
        import transformers  # noqa: F401 - the references need it
    except ImportError as error:
        raise MissingExtraError("bench sources needs torch and transformers: pip install 'w8a8[serve]'") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for spelling, arrays in _layers(size):
            name, reference = _reference(spelling, arrays)
            tensor, ours, out = decoding(arrays)
            ours()
            if reference is not None and not np.array_equal(out.view(np.int16), _bits(reference())):
                raise SelfCheckError(f"{spelling}: the decoder's numbers are not those of {name}")
            times = [(_timed(ours), _timed(reference) if reference else 0.0) for _ in range(runs)]
            mine, theirs = zip(*times, strict=True)
            rows.append(SourceRow(spelling, tensor.stored.nbytes, mine, name, theirs if reference else ()))
            notice(f"{spelling}: {rows[-1].to_dict()['gb_s']:.2f} GB/s")
    finally:
        torch.set_num_threads(threads)
    return SourceResult(size, tuple(rows))


def show(result: SourceResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    table = plain_table("source", "GB/s", "reference", "GB/s", "ratio", left=1)
    for row in (row.to_dict() for row in result.rows):
        theirs = (f"{row['reference_gb_s']:.2f}", f"{row['ratio']:.1f}") if row["ratio"] else ("", "")
        table.add_row(row["spelling"], f"{row['gb_s']:.2f}", row["reference"], *theirs)
    size, runs = result.size, len(result.rows[0].seconds)
    say(f"{size} x {size} weights to BF16 on one core, medians of {runs}; bytes as stored")
    say(table)


def _layers(size: int) -> Iterator[tuple[str, Arrays]]:
    """Every spelling with a layer of it."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x7F, (size, size), dtype=np.uint8)  # any but NaN
    halves = rng.integers(0, 256, (size, size // 2), dtype=np.uint8)
    words = halves.view(np.int32)
    zeros = rng.integers(0, 2**31, (size // 128, size // 8), dtype=np.int32)

    def floats(*shape: int) -> NDArray[Any]:
        return rng.random(shape, dtype=np.float32) + np.float32(0.01)

    bf16 = (floats(size, size // 128).view(np.uint32) >> 16).astype(np.uint16)
    exponents = rng.integers(110, 130, (size, size // 32), dtype=np.uint8)
    blocks, grid = halves.reshape(1, size, size // 32, 16), -(-size // 128)
    scale, group_scale = ("F32", floats(size, 1)), ("BF16", np.ascontiguousarray(bf16.T))
    eight = rng.integers(1, 0x7E, (size, size // 16), dtype=np.uint8)
    yield "FP8, blocks of 128", {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("F32", floats(grid, grid))}
    yield "FP8, rows", {"weight": ("F8_E4M3", codes), "weight_scale": scale}
    yield "INT8, rows", {"weight": ("I8", codes), "weight_scale": scale}
    yield "MXFP4, as transformers", {"e_blocks": ("U8", blocks), "e_scales": ("U8", exponents[None])}
    yield "MXFP4, rows", {"weight_packed": ("U8", halves), "weight_scale": ("U8", exponents)}
    nvfp4 = {"weight_scale": ("F8_E4M3", eight), "weight_global_scale": ("F32", floats(1))}
    yield "NVFP4", {"weight_packed": ("U8", halves), **nvfp4}
    yield "INT4, groups of 128", {"weight_packed": ("I32", words), "weight_scale": ("BF16", bf16)}
    down = np.ascontiguousarray(words.reshape(size // 8, size))
    yield "GPTQ INT4", {"qweight": ("I32", down), "qzeros": ("I32", zeros), "scales": group_scale}
    yield "AWQ INT4", {"qweight": ("I32", words), "qzeros": ("I32", zeros), "scales": group_scale}


def decoding(arrays: Arrays) -> tuple[LogicalTensor, Decode, NDArray[Any]]:
    """The tensor that the spellings see in a layer, what decodes it, and the array that this fills."""
    specs = {
        f"layer.{leaf}": TensorSpec(f"layer.{leaf}", dtype, bits.shape, "memory", 0, bits.nbytes)
        for leaf, (dtype, bits) in arrays.items()
    }
    (tensor,) = (tensor for find in opening.SPELLINGS for tensor in find(specs, {}))
    stored = {name: arrays[name.removeprefix("layer.")] for name in specs}
    data = stored[tensor.stored.name][1]
    beside = [stored[spec.name][1].view(ARRAYS.get(spec.dtype, "<u1")) for spec in tensor.beside]
    if len(tensor.shape) == 3:
        tensor, data, beside = tensor.matrix(0), data[0], [each[0] for each in beside]
    decoder = tensor.decoder
    prepared = decoder.prepare(tensor, beside)
    out: Any = np.empty(tensor.shape, BITS["BF16"])
    raw = memoryview(data.tobytes())
    step = max(1, stream.BLOCK_BYTES // (2 * out.shape[1]) // decoder.step) * decoder.step
    parts = [(begin, out[begin : begin + step]) for begin in range(0, len(out), step)]
    blocks = [(begin, _gathered(decoder.stretch(tensor, begin, begin + len(p)), raw), p) for begin, p in parts]

    def decode() -> None:
        for begin, block, part in blocks:
            decoder.decode(tensor, begin, block, prepared, part)

    return tensor, decode, out


def _gathered(place: Any, raw: memoryview) -> memoryview:
    runs = (place.offset + i * place.stride for i in range(place.runs))
    return memoryview(bytearray().join(raw[at : at + place.nbytes] for at in runs))


def _timed(decode: Decode) -> float:
    started = time.thread_time()
    decode()
    return time.thread_time() - started


def _reference(spelling: str, arrays: Arrays) -> tuple[str, Decode | None]:
    """The library that defines a spelling, and its decoding of the layer; or nothing."""
    import torch

    tensors = {leaf: _torch(dtype, bits) for leaf, (dtype, bits) in arrays.items()}
    if spelling == "FP8, blocks of 128":
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        weight, scale = tensors.values()
        return "transformers", lambda: Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
    if spelling == "MXFP4, as transformers":
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, scales = tensors.values()
        return "transformers", lambda: convert_moe_packed_tensors(blocks, scales)[0]
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    except ImportError:
        return "", None
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "FP8, rows": ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "INT8, rows": ("naive-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        "MXFP4, rows": (
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        ),
        "NVFP4": (
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
        "INT4, groups of 128": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}),
    }
    if spelling not in known:
        return "", None
    name, args = known[spelling]
    compressor = BaseCompressor.get_value_from_registry(name)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    if name == "pack-quantized":
        size = len(tensors["weight_packed"])
        tensors["weight_shape"] = torch.tensor([size, size])
    return "compressed-tensors", lambda: compressor.decompress(dict(tensors), scheme)["weight"].to(torch.bfloat16)


def _torch(dtype: str, bits: NDArray[Any]) -> Any:
    """The tensor of an array's bits."""
    import torch

    kinds = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "I8": torch.int8}
    signed = bits.view(np.int16) if dtype == "BF16" else bits
    tensor = torch.from_numpy(signed)
    return tensor.view(kinds[dtype]) if dtype in kinds else tensor


def _bits(tensor: Any) -> NDArray[Any]:
    import torch

    bits: NDArray[Any] = tensor.contiguous().view(torch.int16).numpy()
    return bits
