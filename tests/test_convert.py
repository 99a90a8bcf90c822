"""`convert`: from one spelling to the other and back, and to BF16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import w8a8
from tests.checkpoints import LLAMA, folder_bytes, llama_tensors, write_checkpoint
from tests.command import cli as run
from tests.runtime.moe import FAMILIES, make, quantize
from w8a8.checkpoint import Checkpoint
from w8a8.errors import TargetExistsError, UsageError
from w8a8.formats import FORMATS
from w8a8.plan.viewing import view_of
from w8a8.quantization import Options
from w8a8.sources.rows import RowReader


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in two shards, with a tokenizer beside them, quantized in both formats."""
    folder = tmp_path_factory.mktemp("convert")
    source = write_checkpoint(folder / "source", llama_tensors(), shards=2)
    (source / "tokenizer.json").write_text("{}")
    for name in FORMATS:
        w8a8.quantize(source, folder / name, Options(format=name))
    return folder


@pytest.mark.parametrize(("before", "after"), [FORMATS, FORMATS[::-1]])
def test_a_spelling_converted_is_that_spelling(llama: Path, tmp_path: Path, before: str, after: str) -> None:
    w8a8.convert(llama / before, tmp_path / "out", after)
    assert folder_bytes(tmp_path / "out") == folder_bytes(llama / after)
    assert w8a8.verify(tmp_path / "out", llama / "source").ok


@pytest.mark.parametrize("name", FORMATS)
def test_bf16_is_codes_times_scales(llama: Path, tmp_path: Path, name: str) -> None:
    w8a8.convert(llama / name, tmp_path / "out", "bf16")
    made, before = tensors_of(tmp_path / "out"), tensors_of(llama / name)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == LLAMA
    assert not (tmp_path / "out" / "w8a8.json").exists()
    assert made.keys() == {name for name in before if not name.endswith("_scale")}
    for key, value in made.items():
        scale = before.get(f"{key}_scale")
        wanted = before[key] if scale is None else (before[key].float() * scale.reshape(-1, 1)).bfloat16()
        assert value.equal(wanted), key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_in_bf16_is_what_transformers_saves_and_loads(tmp_path: Path, family: str) -> None:
    source, out = make(tmp_path / family, family), tmp_path / "out"
    result = quantize(source, tmp_path / "result")
    done: list[int] = []
    w8a8.convert(result, out, "bf16", advance=done.append)
    assert sum(done) == sum(path.stat().st_size for path in result.glob("*.safetensors"))
    made, saved, before = map(tensors_of, (out, source, result))
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {n: (t.shape, t.dtype) for n, t in saved.items()}
    seen, reader = view_of(Checkpoint.open(out)), RowReader(out)
    for name, value in before.items():
        if value.dtype == torch.int8:
            wanted = (value.float() * before[f"{name}_scale"].reshape(-1, 1)).bfloat16().float()
            assert torch.from_numpy(reader.values(seen.tensors[name])).equal(wanted), name
    kind = getattr(transformers, FAMILIES[family][0])
    _, found = kind.from_pretrained(out, output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_what_cannot_be_converted_is_refused(llama: Path, tmp_path: Path) -> None:
    for source, target, reason in [
        ("source", "bf16", "is not quantized"),
        ("source", "quark", "only INT8 W8A8"),
        ("quark", "quark", "is quark already"),
        ("quark", "gguf", "unknown format"),
    ]:
        with pytest.raises(UsageError, match=reason):
            w8a8.convert(llama / source, tmp_path / "out", target)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(TargetExistsError):
        w8a8.convert(llama / "quark", tmp_path / "out", "bf16")


def test_the_command_says_what_it_made(llama: Path, tmp_path: Path) -> None:
    made = run("convert", llama / "quark", tmp_path / "out", "--format", "compressed-tensors", "--json")
    assert json.loads(made.stdout)["format"] == "compressed-tensors"
    refused = run("convert", llama / "quark", tmp_path / "out", "--format", "compressed-tensors")
    assert refused.returncode == TargetExistsError.exit_code


def tensors_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return found
