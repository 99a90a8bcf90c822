"""A GGUF file is seen as the checkpoint that transformers makes of it, bit for bit; what does not fit is named."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import w8a8
from tests.sources.ggufs import ARCHITECTURES, MIXED, split_gguf, write_gguf
from w8a8.checkpoint import Checkpoint, stream
from w8a8.errors import InvalidIndexError, MissingShardError, UnsupportedModelError, UsageError, W8A8Error
from w8a8.plan.viewing import view_of
from w8a8.sources import gguf as sources
from w8a8.sources.rows import RowReader

STREAMED = 1 << 15
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
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    tokenizer.save_pretrained(folder)
    found = dict(apart(load_file(folder / "model.safetensors")))
    if config.model_type != "minimax_m2":
        return found
    modules = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp": "block_sparse_moe"}  # as it is published
    return {".".join(modules.get(part, part) for part in name.split(".")): value for name, value in found.items()}


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
    monkeypatch.setattr(stream, "BLOCK_BYTES", STREAMED)  # or each tensor is one block
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


def test_a_split_file_is_quantized_into_shards_that_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_gguf(tmp_path / "qwen2.gguf", "qwen2")
    out, other = tmp_path / "out", tmp_path / "other"
    w8a8.quantize(whole, out)
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]
    folder = tmp_path / "split"
    folder.mkdir()
    split_gguf(whole, folder, 3)
    (folder / "mmproj-f16.gguf").write_bytes(b"")
    (folder / "README.md").write_text("of the source")
    monkeypatch.setattr(sources, "SHARD_BYTES", 700_000)
    w8a8.quantize(folder, other, hash_source=True)
    names = sorted(path.name for path in other.glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert tensors_of(out) == tensors_of(other)
    for target, source in ((out, whole), (other, folder), (other, folder / "qwen2-00002-of-00003.gguf")):
        result = w8a8.verify(target, source)
        assert not result.problems
    assert json.loads((other / "w8a8.json").read_text())["source"]["sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("qwen2-*.gguf"))
    }
    plan = w8a8.dry_run(folder)
    assert {"mmproj-f16.gguf", "README.md"} <= {name for name, _ in plan.left_out}
    data = bytearray((folder / "qwen2-00002-of-00003.gguf").read_bytes())
    data[-40] ^= 1
    (folder / "qwen2-00002-of-00003.gguf").write_bytes(data)
    assert any("SHA-256 differs" in problem for problem in w8a8.verify(other, folder).problems)


def tensors_of(folder: Path) -> dict[str, bytes]:
    return {
        name: tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else b""
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_inspect_says_what_it_is(tmp_path: Path) -> None:
    found = w8a8.inspect(write_gguf(tmp_path / "small.gguf", "qwen2", ("Q8_0", "Q4_K")))
    assert found.name == "small.gguf"
    assert found.scheme.startswith("GGUF (Q4_K, Q8_0)")
    assert found.architectures == ("Qwen2ForCausalLM",)
    assert {row.dtype for row in found.components} == {"BF16"}


def test_a_file_of_halves_stays_so(tmp_path: Path) -> None:
    view = view_of(Checkpoint.open(write_gguf(tmp_path / "halves.gguf", "qwen2", ("F16",))))
    assert {tensor.dtype for tensor in view.tensors.values()} == {"F16"}
    assert view.config["dtype"] == "float16"
    assert not view.quantized


def change(name: str, **fields: Any) -> Any:
    """Write a file with other fields; or other sizes of a tensor, given in its place."""
    return lambda path: write_gguf(path / "m.gguf", name, **fields)


BROKEN: dict[str, tuple[Any, type[W8A8Error], str]] = {
    "a missing tensor": (
        change("qwen2", skip="blk.1.ffn_up.weight"),
        UnsupportedModelError,
        "lacks model.layers.1.mlp",
    ),
    "a missing expert stack": (change("qwen3moe", skip="blk.0.ffn_up_exps.weight"), UnsupportedModelError, "a part of"),
    "too few experts": (change("qwen3moe", fields={"expert_count": 8}), UnsupportedModelError, "does not fit"),
    "another width": (change("qwen2", fields={"feed_forward_length": 1024}), UnsupportedModelError, "does not fit"),
    "layers without end": (
        change("qwen2", fields={"block_count": 10**9}),
        UnsupportedModelError,
        "tensors of 2 layers",
    ),
    "no heads": (
        change("llama", fields={"attention.head_count": 0}),
        UnsupportedModelError,
        "transformers cannot read",
    ),
    "an architecture of no one": (change("qwen2", named="nobody"), UnsupportedModelError, "nobody"),
    "one that it reshapes": (change("qwen2", named="gpt2"), UnsupportedModelError, "gpt2|GPT2|cannot read"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_what_does_not_fit_is_named(damage: str, tmp_path: Path) -> None:
    write, error, message = BROKEN[damage]
    with pytest.raises(error, match=message):
        Checkpoint.open(write(tmp_path))


def test_of_several_models_one_must_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"2 GGUF models \(a\.gguf, b-00001-of-00002\.gguf\)"):
        Checkpoint.open(tmp_path)
    (tmp_path / "a.gguf").unlink()
    (tmp_path / "b-00001-of-00002.gguf").unlink()
    with pytest.raises(MissingShardError, match="b-00001-of-00002"):
        Checkpoint.open(tmp_path)


def test_parts_of_another_set_are_named(tmp_path: Path) -> None:
    split_gguf(write_gguf(tmp_path / "m.gguf", "qwen2"), tmp_path, 2)
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "x")
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "x").rename(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(InvalidIndexError, match="part 2 of 2, not 1 of 2"):
        Checkpoint.open(tmp_path / "m-00001-of-00002.gguf")
