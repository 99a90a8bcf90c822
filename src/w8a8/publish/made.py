"""A checkpoint that `quantize` made: its folder, and its provenance as `w8a8.json` records it.

Both card and push begin here. The shards that `w8a8.json` lists must be those of the headers.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.checkpoint.reader import INDEX, read_index
from w8a8.checkpoint.stream import file_sha256
from w8a8.errors import UnsupportedSchemeError, W8A8Error
from w8a8.execute.workers import worker_count
from w8a8.formats import Scheme, detect, section
from w8a8.formats.provenance import PROVENANCE, Provenance
from w8a8.plan import scale_name
from w8a8.reading import show

UNVERIFIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
"""Endings of weight files; beside a checkpoint's own shards there should be none."""


@dataclass(frozen=True)
class Made:
    """An opened W8A8 checkpoint and its provenance."""

    checkpoint: Checkpoint
    scheme: Scheme
    provenance: Provenance

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open `folder` by its headers. Raises what `Checkpoint.open` raises, `UnsupportedSchemeError`, `W8A8Error`."""
        checkpoint = Checkpoint.open(folder)
        scheme = detect(checkpoint.config)
        if not scheme.w8a8:
            raise UnsupportedSchemeError(
                f"{folder}: {scheme.summary}; only a checkpoint that `w8a8 quantize` made can be published"
            )
        provenance = Provenance.read(checkpoint.path)
        if provenance is None:
            raise W8A8Error(f"{folder}: no {PROVENANCE}, which says how it was made; `w8a8 quantize` writes it")
        return cls(checkpoint, scheme, provenance)

    @property
    def path(self) -> Path:
        """The folder."""
        return self.checkpoint.path

    @property
    def sees(self) -> bool:
        """True if the model takes images."""
        return bool(section(self.checkpoint.config, "vision_config"))

    def is_quantized(self, tensor: TensorSpec) -> bool:
        """True if `tensor` holds codes that belong to a scale."""
        return tensor.dtype == "I8" and scale_name(tensor.name) in self.checkpoint.tensors

    def problems(self) -> Iterator[str]:
        """Yield where headers, index and folder differ from `w8a8.json`; no weight is read."""
        found = {shard.name: shard.size for shard in self.checkpoint.shards}
        recorded = {name: shard.size for name, shard in self.provenance.shards.items()}
        for name in sorted(found.keys() | recorded.keys()):
            if found.get(name) != recorded.get(name):
                yield f"{name}: {_bytes(found.get(name))} here, {_bytes(recorded.get(name))} in {PROVENANCE}"
        if self.checkpoint.indexed:
            total = read_index(self.path).total_size
            if total != self.checkpoint.nbytes:
                yield f"{INDEX}: total_size is {show(total)}, the tensors have {self.checkpoint.nbytes} bytes"
        for left in self.checkpoint.left_out:
            if left.name.lower().endswith(UNVERIFIED):
                yield f"{left.name}: weights that are not part of the checkpoint, so no checksum covers them"

    def wrong_checksums(self, advance: Callable[[int], None] = lambda _: None) -> list[str]:
        """Read every shard, and name those whose SHA-256 differs from `w8a8.json`. `advance` gets the bytes done."""

        shards = self.provenance.shards

        def check(name: str) -> str | None:
            same = file_sha256(self.path / name) == shards[name].sha256
            advance(shards[name].size)
            return None if same else f"{name}: is not the file that was written (SHA-256 differs from {PROVENANCE})"

        with ThreadPoolExecutor(worker_count(), thread_name_prefix="checksum") as pool:
            return [problem for problem in pool.map(check, sorted(shards)) if problem]


def _bytes(number: int | None) -> str:
    return "none" if number is None else f"{number:,} bytes"
