"""A small checkpoint, its W8A8 twin, and results about it."""

import json
from pathlib import Path

import pytest

import w8a8
from tests.checkpoints import LLAMA, llama_tensors, write_checkpoint
from tests.publish.results import gsm8k, kld
from w8a8.publish.results import Results

CONFIG = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {**llama_tensors(), "fusion.weight": llama_tensors()["lm_head.weight"]}
    return write_checkpoint(tmp_path / "llama", tensors, config=CONFIG, shards=2)


@pytest.fixture
def out(source: Path) -> Path:
    w8a8.quantize(source, source.with_name("llama-W8A8"))
    return source.with_name("llama-W8A8")


@pytest.fixture
def files(tmp_path: Path) -> Results:
    right = [i % 3 > 0 for i in range(60)]
    results = Results(tmp_path / "base.json", tmp_path / "quant.json", tmp_path / "kld.json")
    for path, value in zip(
        (results.baseline, results.quant, results.kld),
        (gsm8k("base", right), gsm8k("quant", [False, *right[1:2], False, *right[3:]]), kld()),
        strict=True,
    ):
        assert path
        path.write_text(json.dumps(value))
    return results
