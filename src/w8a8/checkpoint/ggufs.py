"""Finds the GGUF files that are meant: one, or a set that `llama-gguf-split` made; and opens them.

A set's files are called NAME-00001-of-00003.gguf; the first has the fields, all have tensors. Files called mmproj hold
the part of a model that sees or hears, in llama.cpp's own names; they stay behind.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from w8a8.checkpoint.gguf import GgufHeader, read_gguf
from w8a8.checkpoint.header import DTYPE_BYTES, TensorSpec
from w8a8.checkpoint.mapping import Mapped, map_model
from w8a8.checkpoint.sidecars import LeftOut
from w8a8.errors import DuplicateTensorError, InvalidIndexError, MissingShardError, NoWeightsError, UsageError
from w8a8.reading import brief, show

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PROJECTOR = re.compile(r"(?i).*mmproj.*\.gguf")
_MAX_FILES = 1000


@dataclass(frozen=True)
class Gguf:
    """Opened GGUF files: their headers by name, in order, and the model that they hold."""

    headers: Mapping[str, GgufHeader]
    model: Mapped

    def tensors(self, name: str) -> Iterator[TensorSpec]:
        """The tensors that those in the file `name` become, as a dense checkpoint would have them."""
        for stored in self.headers[name].tensors:
            for made in self.model.parameters.get(stored.name, ()):
                nbytes = math.prod(made.shape) * DTYPE_BYTES[self.model.dtype]
                yield TensorSpec(made.name, self.model.dtype, made.shape, name, stored.offset, nbytes)

    @property
    def label(self) -> str:
        """The dtypes in blocks that the model's tensors have; empty where there are none."""
        used = {t.dtype for header in self.headers.values() for t in header.tensors if t.name in self.model.parameters}
        kinds = sorted(used - DTYPE_BYTES.keys())
        return f"GGUF ({', '.join(kinds)})" if kinds else ""

    def unused(self) -> Iterator[LeftOut]:
        """The tensors that become none."""
        for header in self.headers.values():
            for tensor in header.tensors:
                if tensor.name not in self.model.parameters:
                    yield LeftOut(tensor.name, "transformers has no place for this tensor")


def is_gguf(path: Path) -> bool:
    """Whether a path is called as GGUF files are."""
    return path.name.lower().endswith(".gguf")


def choose(folder: Path, names: Iterable[str]) -> Sequence[str]:
    """Choose the files that hold the model among a folder's files `names`.

    Raises `UsageError` where there are several, `NoWeightsError` where there is none.
    """
    models = sorted({parts_of(name) for name in names if is_gguf(Path(name)) and not _PROJECTOR.fullmatch(name)})
    if len(models) == 1:
        return models[0]
    if models:
        said = ", ".join(brief(parts[0]) for parts in models[:6]) + (", ..." if len(models) > 6 else "")
        raise UsageError(f"{folder}: holds {len(models)} GGUF models ({said}); give the path of one")
    raise NoWeightsError(
        f"{folder}: holds the vision part of a GGUF model (mmproj) alone; the model's own file is missing"
    )


def parts_of(name: str) -> tuple[str, ...]:
    """The names of all files of the set that a file called `name` belongs to; or that one."""
    found = _SPLIT.fullmatch(name)
    count = int(found[3]) if found else 0
    if found is None or not 0 < count <= _MAX_FILES:
        return (name,)
    return tuple(f"{found[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def open_gguf(folder: Path, names: Sequence[str]) -> Gguf:
    """Open the GGUF files `names` of a folder, which are one model.

    Raises what `read_gguf` and `map_model` raise; `MissingShardError`, `InvalidIndexError` or `DuplicateTensorError`
    where files are no set.
    """
    if missing := next((name for name in names if not (folder / name).exists()), None):
        raise MissingShardError(f"{folder / missing}: belongs to the same model, but it is not there; download it too")
    headers = {name: read_gguf(folder / name, name) for name in names}
    first = headers[names[0]]
    for number, (name, header) in enumerate(headers.items()):
        own = header.number("split.no") or 0, header.number("split.count") or 1
        if own != (number, len(names)):
            raise InvalidIndexError(
                f"{folder / name}: says that it is part {own[0] + 1} of {own[1]}, not {number + 1} of {len(names)}; "
                "give its files the names that they had"
            )
    tensors = [tensor for header in headers.values() for tensor in header.tensors]
    home = {tensor.name: tensor.shard for tensor in reversed(tensors)}
    if twice := next((tensor for tensor in tensors if home[tensor.name] != tensor.shard), None):
        raise DuplicateTensorError(
            f"{folder}: {show(twice.name)} is in {home[twice.name]} and in {twice.shard}; download them again"
        )
    return Gguf(headers, map_model(folder / names[0], replace(first, tensors=tuple(tensors))))
