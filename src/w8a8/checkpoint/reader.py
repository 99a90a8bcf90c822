"""`Checkpoint.open`: a folder's config, tensors and sidecar files, from headers alone.

Which files are the weights is decided as transformers decides it: `model.safetensors`, else what
`model.safetensors.index.json` names, else the only safetensors file. An index is checked against the shards it names in
both directions; only a tied `lm_head.weight` may be missing, because the embeddings serve as it. Paths may not leave
the folder; the one exception is a Hugging Face cache snapshot, whose files are links into the `blobs` folder of the
same repository.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Self

from w8a8.checkpoint.gguf import read_gguf
from w8a8.checkpoint.ggufs import Gguf, choose, is_gguf, open_gguf, parts_of
from w8a8.checkpoint.header import TensorSpec, read_header
from w8a8.checkpoint.kinds import instead
from w8a8.checkpoint.sidecars import LeftOut, sort_files
from w8a8.checkpoint.source import is_address
from w8a8.errors import (
    DuplicateTensorError,
    InvalidIndexError,
    MissingShardError,
    MissingTensorError,
    NoConfigError,
    NoWeightsError,
    PathEscapeError,
    PickleOnlyError,
    SourceNotFoundError,
    UnreadableError,
    UsageError,
)
from w8a8.reading import UnfitError, open_file, read_json, reading, real, show

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "lm_head.weight"
MAX_INDEX_BYTES = 40_000_000
"""The largest published has some 25 MB, for 200,000 tensors."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its name in the folder, bytes, tensors in file order, and the metadata of its header."""

    name: str
    size: int
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened by its headers; no weight is read.

    Of a GGUF file, `path` is the folder it lies in, and `shards` have the tensors that a dense checkpoint of the same
    model would have; `gguf` says what they are made from.
    """

    path: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    sidecars: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    indexed: bool
    gguf: Gguf | None = field(default=None, compare=False)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open the checkpoint in `folder`, or a GGUF file, or the only one in a folder.

        Raises the source errors of `w8a8.errors`, each naming file and cause; `UsageError` for the address of a folder.
        """
        path = Path(folder)
        with reading(path):
            if is_gguf(path) and path.is_file():
                return cls._of_gguf(path.parent, parts_of(path.name))
            if not path.is_dir():
                address = str(path).replace(":/", "://", 1)  # of two slashes, a path has left one
                if is_address(address):
                    raise UsageError(f"{address}: this command reads files here; copy the folder first")
                raise SourceNotFoundError(f"{path}: no such folder" + (" (a file)" if path.is_file() else ""))
            names = {entry.name for entry in path.iterdir()}
        if any(map(is_gguf, map(Path, names))) and not any(name.endswith(".safetensors") for name in names):
            return cls._of_gguf(path, choose(path, names), names)
        config = _read_config(path, names)
        index, shard_names = weight_files(path, names)
        shards = tuple(_open_shard(path, name) for name in shard_names)
        tied = tuple(_check_names(shards, index, path, tied=_is_tied(config)))
        with reading(path):
            sidecars, left_out = sort_files(path, {*shard_names} if index is None else {*shard_names, INDEX})
        for name in sidecars:
            _check_copyable(inside(path, name))
        return cls(path, config, shards, sidecars, (*left_out, *tied), index is not None)

    @classmethod
    def _of_gguf(cls, path: Path, files: Sequence[str], names: Iterable[str] = ()) -> Self:
        """Open the GGUF `files` of a folder, of whose other files, among `names`, none is needed."""
        for name in files:
            inside(path, name)
        gguf = open_gguf(path, files)
        shards = tuple(
            Shard(name, header.file_size, tuple(gguf.tensors(name))) for name, header in gguf.headers.items()
        )
        home = gguf.model.folder.path
        made = sorted(entry.name for entry in home.iterdir())
        others = (LeftOut(name, "beside a GGUF file, which says itself what is needed") for name in sorted(names))
        left_out = (*gguf.unused(), *(other for other in others if other.name not in files))
        return cls(path, _read_config(home, set(made)), shards, tuple(made), left_out, len(shards) > 1, gguf)

    @property
    def name(self) -> str:
        """What the folder is called, or the GGUF file."""
        return next(iter(self.gguf.headers)) if self.gguf else real(self.path).name

    @property
    def home(self) -> Path:
        """The folder of config.json and the sidecars."""
        return self.gguf.model.folder.path if self.gguf else self.path

    @property
    def roots(self) -> tuple[Path, ...]:
        """What must be left alone: the folder, or the GGUF files."""
        return tuple(self.path / name for name in self.gguf.headers) if self.gguf else (self.path,)

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (headers not counted)."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())


def stored_tensors(path: Path, shard: str) -> tuple[TensorSpec, ...]:
    """Read what is stored in the weight file at `path`, which goes by the name `shard`. Raises `HeaderError`s."""
    return (read_gguf if is_gguf(path) else read_header)(path, shard).tensors


def weight_files(path: Path, names: set[str]) -> tuple[Mapping[str, str] | None, Sequence[str]]:
    """Return the index of the folder at `path`, if it counts, and the weight files among its files `names`."""
    index = read_index(path).weight_map if INDEX in names and SINGLE not in names else None
    return index, sorted(set(index.values())) if index is not None else [_single_file(path, names)]


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name` if it stays within `folder`, links followed; else raise `PathEscapeError`.

    Raises `UnreadableError` for a name that this locale's file names cannot hold.
    """
    _check_name(folder, name)
    path = folder / name
    try:
        target = real(path)
    except UnicodeEncodeError as error:
        raise UnreadableError(f"{folder}: {show(name)} cannot be spelled here; set LC_ALL=C.UTF-8") from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise PathEscapeError(f"{path}: a link that leads out of the folder, to {target}; copy the file itself here")
    return path


def _check_name(folder: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise PathEscapeError(f"{folder}: {show(name)} leads out of the folder; refusing to follow it")


def _roots(folder: Path) -> tuple[Path, ...]:
    """Return the folder and, for a Hub cache snapshot (`<repo>/snapshots/<commit>`), its repository's blobs."""
    folder = real(folder)
    blobs = folder.parent.parent / "blobs"
    return (folder, blobs) if folder.parent.name == "snapshots" and blobs.is_dir() else (folder,)


def require_config(path: Path, names: set[str]) -> None:
    """Raise `NoConfigError` if there is no config.json among the files `names` of the folder at `path`."""
    if "config.json" not in names:
        raise NoConfigError(f"{path}: no config.json here, so this is not a Hugging Face checkpoint{instead(names)}")


def _read_config(path: Path, names: set[str]) -> dict[str, Any]:
    require_config(path, names)
    file = inside(path, "config.json")
    try:
        return read_json(file, dict[str, Any])
    except UnfitError as error:
        raise NoConfigError(f"{file}: not a valid config ({error})") from error


@dataclass(frozen=True, slots=True)
class Index:
    """`model.safetensors.index.json`: the shard of each tensor by name; `metadata` says how many bytes they have."""

    weight_map: Mapping[str, Any] = field(default_factory=dict)
    metadata: Any = None

    @property
    def total_size(self) -> Any:
        """What the index says of the bytes of all tensors; None where it says nothing."""
        return self.metadata.get("total_size") if isinstance(self.metadata, dict) else None


def read_index(path: Path) -> Index:
    """Read the index of the folder `path`. Raises `InvalidIndexError`, `UnreadableError` or `PathEscapeError`."""
    where = inside(path, INDEX)
    try:
        index = read_json(where, Index, limit=MAX_INDEX_BYTES)
    except UnfitError as error:
        raise InvalidIndexError(f"{where}: not a valid index ({error})") from error
    if not index.weight_map:
        raise InvalidIndexError(f"{where}: no weight_map, so it names no tensors")
    for tensor, shard in index.weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise InvalidIndexError(f"{where}: tensor {show(tensor)} maps to {show(shard)}, not to a file name")
    for shard in set(index.weight_map.values()):
        _check_name(path, shard)
        if "/" in shard or not shard.endswith(".safetensors"):
            raise InvalidIndexError(f"{where}: {show(shard)} is not a safetensors file of this folder")
    return index


def _single_file(path: Path, names: set[str]) -> str:
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if SINGLE in files:
        return SINGLE
    candidates = [name for name in files if not name.startswith(("consolidated", "adapter_"))]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise InvalidIndexError(f"{path}: {len(candidates)} safetensors files but no {INDEX}; download the index too")
    if files:
        return _only_alternative(path, files)
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        raise PickleOnlyError(
            f"{path}: only pickled weights ({pickles[0]}), which can run code when opened and never are here. Convert "
            "them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW_FOLDER) "
            "in transformers writes safetensors"
        )
    raise NoWeightsError(f"{path}: no safetensors weights here{instead(names)}")


def _only_alternative(path: Path, files: list[str]) -> str:
    if len(files) == 1 and files[0].startswith("consolidated"):
        return files[0]
    raise NoWeightsError(f"{path}: only {', '.join(files)} here; adapters are merged into their base model first")


def _open_shard(path: Path, name: str) -> Shard:
    file = inside(path, name)
    with reading(file):
        if not file.exists():
            raise MissingShardError(f"{file}: the index names this shard, but it is not there; finish the download")
    header = read_header(file, name)
    return Shard(name, header.file_size, header.tensors, header.metadata)


def _check_copyable(file: Path) -> None:
    """Raise now if a file cannot be read, not after hours of quantizing."""
    with reading(file):
        open_file(file).close()


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the embeddings serve as `lm_head`; transformers leaves the key out of a config where they do."""
    text = config.get("text_config")
    said = [part.get("tie_word_embeddings") for part in (config, text) if isinstance(part, dict)]
    return False not in said


def _check_names(
    shards: tuple[Shard, ...], index: Mapping[str, str] | None, path: Path, *, tied: bool
) -> Iterator[LeftOut]:
    """Check that each tensor is there once, where the index says; yield the `tied` one that may be missing."""
    home: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in home:
                raise DuplicateTensorError(f"{path}: {show(tensor.name)} is in {home[tensor.name]} and in {shard.name}")
            home[tensor.name] = shard.name
    if index is None:
        return
    for name, shard_name in index.items():
        if name == HEAD and name not in home and tied:
            yield LeftOut(name, f"in {INDEX}, but in no shard; it is tied to the embeddings, which serve as it")
        elif home.get(name) != shard_name:
            found = f"; it is in {home[name]}" if name in home else ""
            raise MissingTensorError(f"{path}: the index puts {show(name)} into {shard_name}, which lacks it{found}")
    for name, shard_name in home.items():
        if name not in index:
            raise InvalidIndexError(f"{path}: {shard_name} holds {show(name)}, which the index does not name")
