"""Files as no tool would write them, and edits to those that one did."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """A tensor's entry in a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_shard(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of any header (bytes as they are, else as JSON) that claims any `length`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def split_shard(content: bytes) -> tuple[bytes, bytes]:
    """The header's text and the data of a valid safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def edit_header(shard: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a shard's header and nothing else."""
    header, data = split_shard(shard.read_bytes())
    entries = json.loads(header)
    change(entries)
    raw_shard(shard, entries, data)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON object in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def hub_cache(root: Path, checkpoint: Path, repo: str, commit: str) -> Path:
    """Lay `checkpoint` out as huggingface_hub caches it: a snapshot of links into blobs."""
    home = root / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for file in sorted(checkpoint.iterdir()):
        large = file.suffix == ".safetensors"  # such files are named by their SHA-256, others by git's SHA-1
        name = hashlib.sha256(file.read_bytes()).hexdigest() if large else hashlib.sha1(file.read_bytes()).hexdigest()
        blob = file.rename(home / "blobs" / name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot
