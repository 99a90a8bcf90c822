"""A checkpoint on disk: config, tensors by name, sidecar files. Knows nothing of quantization.

`Checkpoint.open` reads headers only, and trusts none of them: every offset is checked against the file before anything
is allocated, and the safetensors library has the last word on every file. `resolve` turns what a user types (a folder,
or a Hub id) into such a folder.
"""

from w8a8.checkpoint.header import DTYPE_BYTES, Shaped, TensorSpec, read_header
from w8a8.checkpoint.reader import Checkpoint, Shard
from w8a8.checkpoint.source import Source, resolve

__all__ = ["DTYPE_BYTES", "Checkpoint", "Shaped", "Shard", "Source", "TensorSpec", "read_header", "resolve"]
