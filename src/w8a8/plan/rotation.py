"""A model in rotated coordinates: the same function, whose activations have no outliers left to spoil a token's step.

What flows from layer to layer, x [hidden], is only read through an RMS norm, which a rotation Q commutes with once its
weight g lies in the layers behind it, and only added to by linear layers. So x Q may flow instead (QuaRot, Ashkboos et
al. 2024, arXiv 2404.00456; SpinQuant's R1, Liu et al. 2024, arXiv 2405.16406):

    embeddings E            E Q
    readers W of a norm     W diag(g) Q         q, k, v, gate, up, routers; the head, behind the last norm
    norms g                 1
    writers W               Qᵀ W, and their bias b Q        o, down

Q = S (D ⊗ H) with random signs S, a Hadamard matrix H as large as the power of two that divides the size, and the
orthogonal cosine transform D for the rest. Products are sums in a fixed order, so every machine gets the same bits.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.errors import UnsupportedModelError
from w8a8.formats.arithmetic import decode, encode
from w8a8.kernels.cpu.bits import BITS, Bits
from w8a8.plan.architectures import Group, architecture_of, text_section
from w8a8.sources.beside import FLOATS, Float32s, Rows
from w8a8.sources.view import Beside, Decoder, LogicalTensor, Stretch, View

LAYER = re.compile(r"layers\.(?P<number>\d+)\.(?P<path>.+)\.(?P<leaf>weight|bias)")
EMBEDDING, NORM, HEAD = "embed_tokens.weight", "norm.weight", "lm_head.weight"
"""What lies around the layers; the first two in the decoder."""
HEAD_NORMS = (".q_norm", ".k_norm")
"""The ends of the names of norms inside attention, which the rotation does not reach."""


@dataclass(frozen=True)
class Rotation:
    """Q [size, size]; a value."""

    size: int

    def across(self, columns: Float32s) -> Float32s:
        """Qᵀ times float32 `columns` [size, n]: a new array."""
        power = self.size & -self.size
        made = (columns * self._signs[:, None]).reshape(-1, power, columns.shape[1])
        half = 1
        while half < power:
            pairs = made.reshape(len(made), -1, 2, half, columns.shape[1])
            made = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
            half *= 2
        made = made.reshape(-1, power, columns.shape[1])
        mixed = np.zeros_like(made)
        for j, row in enumerate(self._cosines / np.float32(math.sqrt(power))):
            for i, factor in enumerate(row):
                mixed[j] += made[i] * factor
        return mixed.reshape(columns.shape)

    def along(self, rows: Float32s) -> Float32s:
        """Float32 `rows` [n, size] times Q: a new array."""
        return np.ascontiguousarray(self.across(np.ascontiguousarray(rows.T)).T)

    @cached_property
    def _signs(self) -> Float32s:
        bits = np.unpackbits(np.frombuffer(hashlib.shake_256(b"w8a8").digest(-(-self.size // 8)), np.uint8))
        return bits[: self.size].astype(np.float32) * 2 - 1

    @cached_property
    def _cosines(self) -> Float32s:
        """The transposed orthogonal cosine transform (DCT-II) of the odd part of the size."""
        n = self.size // (self.size & -self.size)
        at = np.arange(n)
        made: NDArray[np.float64] = np.cos(np.pi / n * (at + 0.5) * at[:, None]) * math.sqrt(2 / n)
        made[0] /= math.sqrt(2)
        return made.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Reader(Rows):
    """Rows in rotated coordinates: W diag(g) Q; `beside` has the norm's weight, if any, to which it adds `offset`."""

    rotation: Rotation
    offset: float = 0.0

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:
        """The bytes of the rows; a vector is one."""
        return Rows.stretch(self, tensor, begin, end) if len(tensor.shape) > 1 else Stretch(0, tensor.stored.nbytes)

    def prepare(self, tensor: LogicalTensor, beside: Beside) -> Any:
        """The factors g; 1 where there is no norm."""
        if not beside:
            return np.float32(1)
        return decode(beside[0], tensor.beside[0].dtype).reshape(-1) + np.float32(self.offset)

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, prepared: Any, out: Bits) -> None:  # noqa: ARG002
        """Multiply by the factors, and rotate."""
        values = decode(data, tensor.stored.dtype).reshape(out.shape)
        _put(self.rotation.along(values * prepared), tensor.dtype, out)


@dataclass(frozen=True, slots=True)
class Writer(Decoder):
    """Columns in rotated coordinates: Qᵀ W. All rows are made at once, as each has something of all."""

    rotation: Rotation

    @property
    def step(self) -> int:
        """All rows."""
        return self.rotation.size

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:  # noqa: ARG002
        """The whole matrix."""
        return Stretch(0, tensor.stored.nbytes)

    def prepare(self, tensor: LogicalTensor, beside: Beside) -> Any:  # noqa: ARG002
        """Nothing."""
        return None

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, prepared: Any, out: Bits) -> None:  # noqa: ARG002
        """Rotate."""
        values = decode(data, tensor.stored.dtype).reshape(tensor.stored.shape)
        _put(self.rotation.across(values), tensor.dtype, out)


@dataclass(frozen=True, slots=True)
class Unit(Rows):
    """A norm's weight once its factors lie elsewhere: 1, less what the norm adds to it."""

    offset: float = 0.0

    def prepare(self, tensor: LogicalTensor, beside: Beside) -> Any:  # noqa: ARG002
        """Nothing."""
        return None

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, prepared: Any, out: Bits) -> None:  # noqa: ARG002
        """Write as many."""
        _put(np.full(out.shape, 1 - self.offset, np.float32), tensor.dtype, out)


def rotated(seen: View) -> View:
    """See a model in rotated coordinates.

    Raises UnsupportedModelError where that would not be the same function, or is not known to be: the architecture's
    table does not say `rotates`, the head is the embedding, the source is quantized, or a tensor is no embedding, norm,
    reader or writer.
    """
    architecture = architecture_of(seen.config)
    if not architecture.rotates:
        raise _refused(seen, f"models of type {seen.config.get('model_type')!r} are not known to stay what they are")
    if seen.quantized:
        raise _refused(seen, f"it is in {seen.quantized}; make it BF16 first (w8a8 convert --format bf16)")
    if HEAD not in seen.tensors or text_section(seen.config).get("tie_word_embeddings"):
        raise _refused(seen, "its head is its embedding, and would have to take the last norm's weight")
    embedding = next((t for name, t in seen.tensors.items() if name.endswith(EMBEDDING)), None)
    if embedding is None:
        raise _refused(seen, f"it has no {EMBEDDING}")
    places = _Places(architecture.groups, embedding.name.removesuffix(EMBEDDING), Rotation(embedding.shape[1]))
    shards = (replace(s, tensors=tuple(_turned(seen, t, places) for t in s.tensors)) for s in seen.shards)
    return replace(seen, shards=tuple(shards))


@dataclass(frozen=True, slots=True)
class _Places:
    """What the tensors of a model do, by their names: those of its `decoder` begin with its name."""

    groups: tuple[Group, ...]
    decoder: str
    rotation: Rotation

    def spelling(self, name: str) -> tuple[Decoder | None, str]:
        """How the tensor `name` is turned, and the norm whose weight it takes, "" for none; None: not at all.

        Raises LookupError where that is not known.
        """
        norms = {group.producer: group for group in self.groups if group.kind == "norm"}
        offset = next(iter(norms.values())).offset
        around: dict[str, tuple[Decoder | None, str]] = {
            f"{self.decoder}{EMBEDDING}": (Reader(self.rotation), ""),
            f"{self.decoder}{NORM}": (Unit(offset), ""),
            HEAD: (Reader(self.rotation, offset), f"{self.decoder}{NORM}"),
        }
        if name in around:
            return around[name]
        found = LAYER.fullmatch(name.removeprefix(self.decoder))
        path, weight = (found["path"], found["leaf"] == "weight") if found else ("", False)
        if path in norms and weight:
            return Unit(norms[path].offset), ""
        for group in self.groups:
            if any(fnmatchcase(path, each) for each in (*group.consumers, *group.readers)) and found:
                if group.kind != "norm":
                    return Writer(self.rotation) if weight else Reader(self.rotation), ""
                norm = f"{self.decoder}layers.{found['number']}.{group.producer}.weight"
                return (Reader(self.rotation, group.offset), norm) if weight else (None, "")
        if path.endswith(HEAD_NORMS):
            return None, ""
        raise LookupError(name)


def _turned(seen: View, tensor: LogicalTensor, places: _Places) -> LogicalTensor:
    try:
        decoder, norm = places.spelling(tensor.name)
        beside = (seen.tensors[norm].stored,) if norm else ()
    except LookupError as error:
        raise _refused(seen, f"it is not known what {tensor.name} reads or writes") from error
    if decoder is None:
        return tensor
    size = tensor.shape[0] if isinstance(decoder, Writer) else tensor.shape[-1]
    if not tensor.plain or tensor.every != 1 or tensor.dtype not in FLOATS or size != places.rotation.size:
        raise _refused(seen, f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}")
    return replace(tensor, decoder=decoder, beside=beside)


def _refused(seen: View, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{seen.path}: cannot be rotated: {why}; take another --recipe")


def _put(values: NDArray[Any], dtype: str, out: Bits) -> None:
    out[...] = np.frombuffer(encode(values, dtype), BITS[dtype]).reshape(out.shape)
