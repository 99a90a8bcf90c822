"""A GGUF file is seen as the checkpoint that transformers makes of it, bit for bit; what does not fit is named."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.sources.ggufs import ARCHITECTURES, MIXED, write_gguf
from w8a8.checkpoint import Checkpoint, stream
from w8a8.plan.viewing import view_of
from w8a8.sources.rows import RowReader

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def by_transformers(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers' own reader of GGUF makes of a file, in BF16, saved and read again."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if config.model_type == "qwen3_moe":
        config.moe_intermediate_size = 512  # it leaves the size of one published model
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return dict(apart(load_file(folder / "model.safetensors")))


def apart(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each expert by itself, where all of a layer are one tensor."""
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            yield name, tensor
            continue
        for number, expert in enumerate(tensor):
            parts = (
                {"gate_proj": expert.chunk(2)[0], "up_proj": expert.chunk(2)[1]} if "gate" in leaf else {leaf: expert}
            )
            yield from ((f"{stem}.{number}.{part}.weight", value) for part, value in parts.items())


def by_us(view: Any) -> dict[str, torch.Tensor]:
    reader = RowReader(view.path)
    return {
        tensor.name: torch.frombuffer(reader.read(tensor), dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)
        for tensor in view.tensors.values()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_what_transformers_makes(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1 << 15)  # or each tensor is one block
    kinds = tuple(kind for kind in MIXED if kind != "Q5_0" or architecture != "lfm2")  # not read by transformers there
    path = write_gguf(tmp_path / f"{architecture}.gguf", architecture, kinds)
    expected = by_transformers(path, tmp_path / "reference")
    view = view_of(Checkpoint.open(path))
    found = by_us(view)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert view.quantized.startswith("GGUF")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        made, reference = view.home / name, tmp_path / "reference" / name
        assert json.loads(made.read_text()) == json.loads(reference.read_text()), name
    assert (view.home / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
