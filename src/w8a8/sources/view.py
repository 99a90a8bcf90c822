"""A checkpoint as everything downstream sees it: logical tensors, whatever they are stored as.

A logical tensor is what a model's layer holds, in BF16, F16 or F32: most are stored just so, others as FP8 blocks and
their scales, as packed integers, or as one expert's part of a tensor that holds all experts. Each says where its rows
lie (`stored`, and small tensors `beside` it that decoding needs whole), and has a `Decoder`, which makes rows of
numbers from bytes. All of it is a value: it can be compared, printed, and sent to another process.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from w8a8.checkpoint import Checkpoint, Shard, TensorSpec
from w8a8.checkpoint.header import DTYPE_BITS
from w8a8.checkpoint.sidecars import LeftOut
from w8a8.kernels.cpu.bits import Bits

Beside = Sequence[NDArray[Any]]
"""The tensors beside one, whole, each as an array of its shape; BF16 and FP8 as the unsigned integers of their bits."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a tensor: `runs` runs of `nbytes` bytes each, the first from byte `offset` on, one every `stride`."""

    offset: int
    nbytes: int
    runs: int = 1
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Decoder:
    """How a matrix's rows are made from the bytes of `stored`. A value; each spelling has a subclass.

    A matrix is `tensor.stored` with two dimensions as its spelling stores them; `rows` are those of the matrix that the
    spelling describes, before `first` and `every` choose among them.
    """

    @property
    def step(self) -> int:
        """Rows are asked for in multiples of it, counted from row 0; the last ones may be fewer."""
        return 1

    @property
    def label(self) -> str:
        """What users call the spelling: "FP8 in blocks of 128 x 128"; "" for what is not quantized."""
        return ""

    @property
    def border(self) -> int:
        """A row that begins what is asked for: no rows before it are asked for together with it; 0 where none does."""
        return 0

    def transposed(self) -> "Decoder":
        """The decoder of the same bytes' transposed matrix. Raises NotImplementedError where there is none."""
        raise NotImplementedError

    def stretch(self, tensor: "LogicalTensor", begin: int, end: int) -> Stretch:
        """The bytes of `tensor.stored`, counted from its start, that rows `begin` to `end` are made from."""
        raise NotImplementedError

    def prepare(self, tensor: "LogicalTensor", beside: Beside) -> Any:
        """What `decode` needs of the tensors beside, made and checked once per matrix.

        Raises a `SourceError` where they do not fit: shape, dtype, a scale that is zero, negative, NaN or infinite.
        """
        raise NotImplementedError

    def decode(self, tensor: "LogicalTensor", begin: int, data: memoryview, prepared: Any, out: Bits) -> None:
        """Write rows from `begin` on into `out` [rows, columns], bit patterns of `tensor.dtype`.

        `data` holds the bytes of `stretch(tensor, begin, begin + len(out))`, run after run.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Plain(Decoder):
    """The rows as they are: BF16, F16 or F32, one after the other (any dtype, where a tensor is only copied)."""


PLAIN = Plain()


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor of the model: `name`, safetensors `dtype` and `shape` are what a dense checkpoint would have.

    `stored` is the tensor of the file that its rows are made from, or a part of one: a `TensorSpec` whose `offset` and
    `shape` mean one expert's matrix. Row i is row `first + i * every` of what the decoder makes of it. With three
    dimensions it is a stack of matrices, and `stored` and all of `beside` have as many (`matrix` gives one).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: TensorSpec
    decoder: Decoder = PLAIN
    beside: tuple[TensorSpec, ...] = ()
    first: int = 0
    every: int = 1

    @property
    def shard(self) -> str:
        """The file that holds `stored`."""
        return self.stored.shard

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in `dtype`."""
        return self.numel * DTYPE_BITS[self.dtype] // 8

    @property
    def spec(self) -> TensorSpec:
        """What a dense checkpoint's header would say of it; the file and the offset are where it is stored."""
        return TensorSpec(self.name, self.dtype, self.shape, self.shard, self.stored.offset, self.nbytes)

    @property
    def plain(self) -> bool:
        """Whether its bytes are those of `stored`."""
        return self.decoder == PLAIN

    def matrix(self, index: int) -> "LogicalTensor":
        """The matrix `index` of a stack; what lies beside it in one piece serves all matrices."""
        count = self.stored.shape[0]
        beside = tuple(part(each, index) if each.shape[:1] == (count,) else each for each in self.beside)
        return replace(self, shape=self.shape[1:], stored=part(self.stored, index), beside=beside)


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor of the model that holds all experts of a layer, where the checkpoint has them one by one.

    `experts` are the parts of each, all of one shape and dtype; they may lie in several files. `transposed` and
    `interleaved` say how they are put together, as of `w8a8.sources.experts.Stack`.
    """

    name: str
    experts: tuple[tuple[LogicalTensor, ...], ...]
    transposed: bool
    interleaved: bool

    @property
    def dtype(self) -> str:
        """That of its parts."""
        return self.experts[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Experts, and the rows and columns of one, or its elements."""
        rows, *columns = self.experts[0][0].shape
        own = (len(self.experts[0]) * rows, *columns)
        return (len(self.experts), *(own[::-1] if self.transposed else own))

    @property
    def spec(self) -> TensorSpec:
        """What a dense checkpoint's header would say of it; the file and the offset are those of its first part."""
        first, nbytes = self.experts[0][0], sum(part.nbytes for parts in self.experts for part in parts)
        return TensorSpec(self.name, self.dtype, self.shape, first.shard, first.stored.offset, nbytes)


@dataclass(frozen=True, slots=True)
class ViewShard:
    """One file of a checkpoint: what is stored in it, and the logical tensors made from that, in the file's order.

    `joined` are those made from several, some of which may lie in other files. Or a part of a file, from byte `begin`
    to byte `end`; and where the result is to have another name, `target`.
    """

    stored: Shard
    tensors: tuple[LogicalTensor, ...]
    joined: tuple[Joined, ...] = ()
    target: str = ""
    begin: int = 0
    end: int | None = None

    @property
    def name(self) -> str:
        """The name of what is made from it."""
        return self.target or self.stored.name

    @property
    def size(self) -> int:
        """Its bytes."""
        return (self.stored.size if self.end is None else self.end) - self.begin

    @property
    def whole(self) -> bool:
        """Whether it is all of a file."""
        return self.size == self.stored.size


@dataclass(frozen=True)
class View:
    """A checkpoint as logical tensors.

    `config` is the checkpoint's without what it says of a quantization; `quantized` says how the source is quantized
    ("FP8, blocks of 128 x 128"), or is empty. `stacks` are the tensors that hold all experts of a layer, by the names
    of the expert tensors that they are seen as.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    shards: tuple[ViewShard, ...]
    quantized: str = ""
    stacks: Mapping[str, LogicalTensor] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.checkpoint.path

    @property
    def home(self) -> Path:
        """The folder of config.json and the sidecars."""
        return self.checkpoint.home

    @property
    def sidecars(self) -> tuple[str, ...]:
        """The small files that a copy of the checkpoint needs."""
        return self.checkpoint.sidecars

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The files that it does not need."""
        return self.checkpoint.left_out

    @property
    def indexed(self) -> bool:
        """Whether an index names the shards."""
        return len(self.shards) > 1 if self.checkpoint.gguf else self.checkpoint.indexed

    @cached_property
    def tensors(self) -> Mapping[str, LogicalTensor]:
        """Every logical tensor by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all logical tensors in their dtypes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(spec.nbytes for shard in self.shards for spec in shard.stored.tensors)

    @property
    def numel(self) -> int:
        """Elements of all logical tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())


def part(spec: TensorSpec, index: int) -> TensorSpec:
    """The part `index` along the first dimension of a stored tensor."""
    nbytes = spec.nbytes // spec.shape[0]
    return replace(spec, shape=spec.shape[1:], offset=spec.offset + index * nbytes, nbytes=nbytes)


def plain(spec: TensorSpec) -> LogicalTensor:
    """A tensor that is stored as it is."""
    return LogicalTensor(spec.name, spec.dtype, spec.shape, spec)
