"""`w8a8.json`, beside every checkpoint that this tool makes: its source, its making, and the checksums of both.

One schema, written and read here only. The file is validated before it is believed, like any other; it holds no times
and no paths, so that the same job gives the same bytes anywhere.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from msgspec import Meta

from w8a8.errors import W8A8Error
from w8a8.reading import UnfitError, read_json

PROVENANCE = "w8a8.json"

Name = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The source: a Hub id or a folder's name, the commit, and the SHA-256 of each shard, where known, by its name.

    `quantized` says how the source is quantized itself; empty where it is dense.
    """

    name: Name
    revision: Name | None = None
    sha256: Mapping[str, Sha256] = field(default_factory=dict)
    quantized: Annotated[str, Meta(max_length=300)] = ""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The text that the model read, and its SHA-256."""

    name: Name
    sha256: Name


@dataclass(frozen=True, slots=True)
class NormFold:
    """A norm whose weight calibration changed, what it adds to its weight, and the weights that undo the change."""

    name: str
    offset: float
    into: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """How scales and codes were chosen.

    `kept` are modules left in BF16 by the budget `keep_bf16`; `changed` are quantized tensors and `folded` copied ones
    that are not what rounding the source to nearest gives. `groups` says, for people, what was calibrated together and
    what its scales went into.
    """

    text: CalibrationText
    samples: Count
    tokens: Count
    keep_bf16: Share
    kept: tuple[str, ...]
    changed: tuple[str, ...]
    folded: tuple[str, ...]
    norms: tuple[NormFold, ...]
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SchemeText:
    """The arithmetic, in words."""

    weights: Name
    activations: Name


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """Bytes of all tensors, before and after."""

    source: Count
    result: Count


@dataclass(frozen=True, slots=True)
class ShardFile:
    """Size in bytes and SHA-256 of an output shard."""

    size: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class SmallFile:
    """Size in bytes and SHA-256 of a file beside the shards."""

    size: Annotated[int, Meta(ge=0)]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Provenance:
    """The content of `w8a8.json`.

    `files` are the other files that were written or copied, all but `w8a8.json` itself; in a file that an earlier
    version wrote there are none.
    """

    version: Name
    source: SourceFiles
    architecture: Name
    format: Name
    recipe: Name
    scheme: SchemeText
    bytes: TensorBytes
    quantized_tensors: int
    shards: Mapping[str, ShardFile]
    files: Mapping[str, SmallFile] = field(default_factory=dict)
    tool: str = "w8a8"
    calibration: CalibrationRecord | None = None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the provenance of the checkpoint in `folder`; None where there is none.

        Raises `W8A8Error` where the file is not as `quantize` writes it.
        """
        path = folder / PROVENANCE
        if not path.exists():
            return None
        try:
            return read_json(path, cls)
        except UnfitError as error:
            raise W8A8Error(f"{path}: not as `quantize` wrote it ({error}); quantize again") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in the order of the file; `calibration` only where there was one."""
        values = asdict(self)
        order = ("tool", "version", "source", "architecture", "format", "recipe", "calibration", "scheme", "bytes")
        if self.calibration is None:
            del values["calibration"]
        return {key: values[key] for key in (*order, "quantized_tensors", "shards", "files") if key in values}
