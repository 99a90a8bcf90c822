"""A checkpoint that `quantize` made: its folder, and its provenance as `w8a8.json` records it.

Both card and push begin here. The shards that `w8a8.json` lists must be those of the headers.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.checkpoint.reader import INDEX, read_json
from w8a8.checkpoint.stream import file_sha256
from w8a8.errors import UnsupportedSchemeError, W8A8Error
from w8a8.execute.workers import worker_count
from w8a8.formats import Scheme, detect, section
from w8a8.formats.provenance import PROVENANCE
from w8a8.plan import scale_name
from w8a8.terminal.wording import printable

UNVERIFIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
"""Endings of weight files; beside a checkpoint's own shards there should be none."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """On what it was calibrated, by what share it might grow, and the modules that were left as they are for it."""

    text: str
    sha256: str
    samples: int
    tokens: int
    keep_bf16: float
    kept: frozenset[str]


@dataclass(frozen=True)
class Made:
    """An opened W8A8 checkpoint and its provenance.

    `source_bytes` are of the tensors it was made from, `shards` map names to file sizes and SHA-256. Text is printable.
    """

    checkpoint: Checkpoint
    scheme: Scheme
    version: str
    source: str
    revision: str | None
    format: str
    recipe: str
    calibration: Calibration | None
    source_bytes: int
    arithmetic: Mapping[str, str]
    shards: Mapping[str, tuple[int, str]]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open `folder` by its headers. Raises what `Checkpoint.open` raises, `UnsupportedSchemeError`, `W8A8Error`."""
        checkpoint = Checkpoint.open(folder)
        scheme = detect(checkpoint.config)
        if not scheme.w8a8:
            raise UnsupportedSchemeError(
                f"{folder}: {scheme.summary}; only a checkpoint that `w8a8 quantize` made can be published"
            )
        path = checkpoint.path / PROVENANCE
        if not path.is_file():
            raise W8A8Error(f"{folder}: no {PROVENANCE}, which says how it was made; `w8a8 quantize` writes it")
        try:
            return cls(checkpoint, scheme, **_provenance(read_json(path)))
        except (ValueError, OSError) as error:
            raise W8A8Error(f"{path}: not as `quantize` wrote it ({error}); quantize again") from error

    @property
    def path(self) -> Path:
        """The folder."""
        return self.checkpoint.path

    @property
    def from_hub(self) -> bool:
        """Whether the source was a repository on the Hub; the name of a folder has no slash."""
        return "/" in self.source

    @property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return bool(section(self.checkpoint.config, "vision_config"))

    def is_quantized(self, tensor: TensorSpec) -> bool:
        """Whether `tensor` holds codes that belong to a scale."""
        return tensor.dtype == "I8" and scale_name(tensor.name) in self.checkpoint.tensors

    def problems(self) -> Iterator[str]:
        """Yield where headers, index and folder differ from `w8a8.json`; no weight is read."""
        found = {shard.name: shard.size for shard in self.checkpoint.shards}
        for name in sorted(found.keys() | self.shards.keys()):
            recorded = self.shards.get(name, (None, ""))[0]
            if found.get(name) != recorded:
                yield f"{name}: {_bytes(found.get(name))} here, {_bytes(recorded)} in {PROVENANCE}"
        if self.checkpoint.indexed:
            total = section(read_json(self.path / INDEX), "metadata").get("total_size")
            if total != self.checkpoint.nbytes:
                yield f"{INDEX}: total_size is {total}, the tensors have {self.checkpoint.nbytes} bytes"
        for left in self.checkpoint.left_out:
            if left.name.lower().endswith(UNVERIFIED):
                yield f"{left.name}: weights that are not part of the checkpoint, so no checksum covers them"

    def wrong_checksums(self, advance: Callable[[int], None] = lambda _: None) -> list[str]:
        """Read every shard, and name those whose SHA-256 differs from `w8a8.json`. `advance` gets the bytes done."""

        def check(name: str) -> str | None:
            same = file_sha256(self.path / name) == self.shards[name][1]
            advance(self.shards[name][0])
            return None if same else f"{name}: is not the file that was written (SHA-256 differs from {PROVENANCE})"

        with ThreadPoolExecutor(worker_count(), thread_name_prefix="checksum") as pool:
            return [problem for problem in pool.map(check, sorted(self.shards)) if problem]


def _provenance(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Made` that `w8a8.json` holds. Raises `ValueError` where one is not what it should be."""
    source = section(values, "source")
    return {
        "version": _text(values, "version"),
        "source": _text(source, "name"),
        "revision": None if source.get("revision") is None else _text(source, "revision"),
        "format": _text(values, "format"),
        "recipe": _text(values, "recipe"),
        "calibration": _calibration(section(values, "calibration")) if "calibration" in values else None,
        "source_bytes": _number(section(values, "bytes"), "source"),
        "arithmetic": {key: _text(section(values, "scheme"), key) for key in ("weights", "activations")},
        "shards": {name: _shard(values, name) for name in section(values, "shards")},
    }


def _calibration(values: Mapping[str, Any]) -> Calibration:
    text, share, kept = section(values, "text"), values.get("keep_bf16"), values.get("kept")
    if not isinstance(share, float) or not 0 <= share <= 1:
        raise ValueError("keep_bf16 is no share")
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise ValueError("kept are no names")
    numbers = (_number(values, "samples"), _number(values, "tokens"))
    return Calibration(_text(text, "name"), _text(text, "sha256"), *numbers, share, frozenset(kept))


def _shard(values: Mapping[str, Any], name: str) -> tuple[int, str]:
    shard = section(values, "shards", name)
    digest = _text(shard, "sha256")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"the sha256 of {name} is none")
    return _number(shard, "size"), digest


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} is not text")
    return printable(value)


def _number(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or value <= 0:
        raise ValueError(f"{key} is not a number of bytes")
    return value


def _bytes(number: int | None) -> str:
    return "none" if number is None else f"{number:,} bytes"
