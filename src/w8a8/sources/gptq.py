"""GPTQ and AWQ: integers in `qweight` I32, with `scales` and packed `qzeros` for groups of inputs.

GPTQ packs down the inputs: `qweight` [in * bits / 32, out], 2, 3, 4 or 8 bits, code i of a column at its bit i * bits;
`qzeros` [groups, out * bits / 32] along the outputs, one too small in version 1 of the format (all but "gptq_v2");
`g_idx` [in], if it is there, is the group of each input. Defined in GPTQModel, nn_modules/qlinear/__init__.py.
AWQ packs eight outputs of 4 bits into a word in the order 0, 2, 4, 6, 1, 3, 5, 7: `qweight` [in, out / 8] and `qzeros`
[groups, out / 8]. Defined in AutoAWQ, utils/packing_utils.py. `scales` is [groups, out] in both.
A weight is `(code - zero) * scale`, a float32 product rounded to the dtype of the scale.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from w8a8.checkpoint import TensorSpec
from w8a8.errors import AlreadyQuantizedError
from w8a8.kernels.cpu.bits import Bits
from w8a8.sources.beside import (
    FLOATS,
    Tensors,
    blocks,
    companion,
    dense_dtype,
    dropped,
    expect,
    groups,
    model_dtype,
    module_of,
    named,
    positive,
    row_bytes,
    said,
    shown,
    wrong,
)
from w8a8.sources.view import Beside, Decoder, LogicalTensor, Stretch

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ: the output, of eight, whose code the four bits k of a word are."""


@dataclass(frozen=True, slots=True)
class Gptq(Decoder):
    """Words whose codes follow each other down the inputs.

    `group`: inputs of a scale, 0 for all; `more`: what stored zero points lack.
    """

    bits: int
    group: int
    more: int

    @property
    def label(self) -> str:
        """The method, the bits, and how scales are shared."""
        return f"GPTQ INT{self.bits} {said((1, self.group))}"

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:
        """The words of the outputs, in each row of words."""
        return Stretch(4 * begin, 4 * (end - begin), tensor.stored.shape[0], row_bytes(tensor.stored))

    def prepare(self, tensor: LogicalTensor, beside: Beside) -> Any:
        """Scales and zero points [out, groups], and the group of each input where they are not in order.

        Raises `SourceError`.
        """
        from w8a8.kernels.cpu import decoding

        tensors = named(tensor, beside)
        scale = positive(*tensors["scales"])
        points = decoding.unpacked(tensors["qzeros"][1].view(np.uint32), self.bits, scale.shape[1])
        zero = (points.astype(np.int32) + self.more) & ((1 << self.bits) - 1)
        order = tensors.get("g_idx")
        known = groups(*order, scale.shape[0], self.group or tensor.shape[1]) if order else None
        return decoding.turned(scale), decoding.turned(zero), known

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, prepared: Any, out: Bits) -> None:  # noqa: ARG002
        """Turn the words, unpack, subtract, multiply."""
        from w8a8.kernels.cpu import decoding

        scale, zero, order = prepared
        words = decoding.turned(np.frombuffer(data, np.uint32).reshape(-1, len(out)))
        codes = decoding.unpacked(words, self.bits, out.shape[1])
        if order is None:
            decoding.integers(codes, scale, zero, (1, self.group or out.shape[1]), begin, out)
        else:
            decoding.ordered(codes, scale, zero, order, begin, out)


@dataclass(frozen=True, slots=True)
class Awq(Decoder):
    """Words of eight outputs each. `group`: inputs of a scale, 0 for all."""

    group: int

    @property
    def label(self) -> str:
        """The method, the bits, and how scales are shared."""
        return f"AWQ INT4 {said((1, self.group))}"

    @property
    def step(self) -> int:
        """The outputs of a word."""
        return 8

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:
        """The words of the outputs, for each input."""
        return Stretch(begin // 2, (end - begin) // 2, tensor.stored.shape[0], row_bytes(tensor.stored))

    def prepare(self, tensor: LogicalTensor, beside: Beside) -> Any:
        """Scales and zero points [out, groups]. Raises `SourceError`."""
        from w8a8.kernels.cpu import decoding

        tensors = named(tensor, beside)
        words = decoding.turned(tensors["qzeros"][1].view(np.uint32))
        zero = decoding.unpacked_down(words, ORDER).astype(np.int32)
        return decoding.turned(positive(*tensors["scales"])), zero

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, prepared: Any, out: Bits) -> None:  # noqa: ARG002
        """Turn the words, unpack, subtract, multiply."""
        from w8a8.kernels.cpu import decoding

        scale, zero = prepared
        words = decoding.turned(np.frombuffer(data, np.uint32).reshape(out.shape[1], -1))
        decoding.integers(
            decoding.unpacked_down(words, ORDER), scale, zero, (1, self.group or out.shape[1]), begin, out
        )


def find(tensors: Tensors, declared: Mapping[str, Any]) -> Iterator[LogicalTensor]:
    """Find GPTQ's and AWQ's weights, told apart by their shapes.

    Raises `SourceError`, and `AlreadyQuantizedError` for an AWQ layout other than "gemm".
    """
    model = model_dtype(tensors.values())
    for spec in tensors.values():
        if spec.name.endswith(".qweight") and spec.dtype == "I32" and len(spec.shape) == 2:
            if (version := declared.get("version", "gemm")) in {"gemv", "gemv_fast", "marlin", "exllama", "ipex"}:
                raise AlreadyQuantizedError(f"{spec.shard}: AWQ {version} is not read; quantize the BF16 original")
            yield _weight(tensors, spec, declared, model)


def _weight(tensors: Tensors, spec: TensorSpec, declared: Mapping[str, Any], model: str) -> LogicalTensor:
    module = module_of(spec.name)
    scales, zeros = (companion(tensors, spec, f"{module}.{leaf}") for leaf in ("scales", "qzeros"))
    order = tensors.get(f"{module}.g_idx")
    expect(scales, spec, FLOATS)
    if len(scales.shape) != 2 or not scales.numel:
        raise wrong(scales, f"has the shape {list(scales.shape)}, not groups and outputs")
    # 1) Which of the two, and of how many bits.
    count, outputs = scales.shape
    awq = 8 * spec.shape[1] == outputs
    if not awq and spec.shape[1] != outputs:
        raise wrong(scales, f"has the shape {list(scales.shape)}, which fits {shown(spec)} neither as GPTQ nor as AWQ")
    bits = 4 if awq else 32 * (zeros.shape[-1] if zeros.shape else 0) // outputs
    if bits not in {2, 3, 4, 8}:
        raise wrong(zeros, f"has the shape {list(zeros.shape)}, which gives {outputs} outputs no zero points")
    expect(zeros, spec, ("I32",), (count, blocks(outputs * bits, 32)))
    if (stated := declared.get("bits", declared.get("w_bit", bits))) != bits:
        raise wrong(spec, f"has {bits} bits a weight by its shape and {stated} by the config")
    # 2) The inputs and their groups.
    inputs = spec.shape[0] if awq else 32 * spec.shape[0] // bits
    group = _group(declared, scales, inputs)
    beside = [scales, zeros]
    if order and not awq:
        expect(order, spec, ("I32", "I64"), (inputs,))
        beside.append(order)
    decoder = Awq(group) if awq else Gptq(bits, group, int(declared.get("checkpoint_format") != "gptq_v2"))
    name = f"{module}.weight"
    beside += dropped(tensors, name)
    return LogicalTensor(name, dense_dtype(scales, model), (outputs, inputs), spec, decoder, tuple(beside))


def _group(declared: Mapping[str, Any], scales: TensorSpec, inputs: int) -> int:
    """The inputs of a scale: those that the config declares, or equal shares. Raises `SourceError`."""
    count, size = scales.shape[0], declared.get("group_size", declared.get("q_group_size"))
    if isinstance(size, int) and 0 < size < inputs:
        if blocks(inputs, size) != count:
            raise wrong(scales, f"has {count} groups for {inputs} inputs; the config's groups of {size} do not give it")
        return size
    if count == 1:
        return 0
    if inputs % count:
        raise wrong(scales, f"has {count} groups, which do not divide {inputs} inputs")
    return inputs // count
