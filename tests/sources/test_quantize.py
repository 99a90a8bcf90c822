"""A source that is quantized already is quantized as its dequantized copy is: the same codes, the same scales."""

from pathlib import Path

import pytest
import torch

import w8a8
from tests.checkpoints import LLAMA, llama_tensors, read_tensor, write_checkpoint
from tests.sources.decoding import bits, dtype_name
from tests.sources.makers import MAKERS, stored_as
from w8a8.checkpoint import Checkpoint
from w8a8.plan.viewing import view_of
from w8a8.sources.rows import RowReader


@pytest.mark.parametrize("kind", MAKERS)
def test_codes_and_scales_are_those_of_the_dequantized_copy(tmp_path: Path, kind: str) -> None:
    stored = {}
    for name, (dtype, values) in llama_tensors(layers=1).items():
        if "_proj" not in name:
            stored[name] = dtype, values
            continue
        for leaf, tensor in stored_as(kind, name, torch.from_numpy(values)).items():
            stored[leaf] = dtype_name(tensor), bits(tensor)
    source = write_checkpoint(tmp_path / "source", stored, shards=2)
    # The same as a dense checkpoint, in the order of the source
    view = view_of(Checkpoint.open(source))
    assert view.quantized == MAKERS[kind][1]
    reader = RowReader(source)
    dense = {name: (tensor.dtype, reader.values(tensor)) for name, tensor in view.tensors.items()}
    assert {name: values.shape for name, (_, values) in dense.items()} == {
        name: values.shape for name, (_, values) in llama_tensors(layers=1).items()
    }
    write_checkpoint(tmp_path / "dense", dense, config=LLAMA, shards=2)
    results = []
    for folder in ("source", "dense"):
        w8a8.quantize(tmp_path / folder, out := tmp_path / f"{folder}-w8a8")
        assert w8a8.verify(out, tmp_path / folder).ok
        opened = Checkpoint.open(out)
        results.append({name: read_tensor(opened, spec) for name, spec in opened.tensors.items()})
    assert results[0] == results[1]
