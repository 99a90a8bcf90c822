import json
from pathlib import Path

import pytest

import w8a8
from tests.checkpoints import LLAMA, llama_tensors
from w8a8.checkpoint.header import write_header
from w8a8.quantization import Options


def test_an_unquantized_checkpoint_is_described(llama: Path) -> None:
    found = w8a8.inspect(llama)
    assert found.architectures == ("LlamaForCausalLM",)
    assert (found.scheme, found.w8a8) == ("not quantized", False)
    assert {row.component for row in found.components} == {"attention", "mlp", "embeddings", "lm_head", "norms"}
    assert found.nbytes == 2 * found.parameters


@pytest.mark.parametrize("format", ["quark", "compressed-tensors"])
def test_our_results_are_recognised(llama: Path, tmp_path: Path, format: str) -> None:  # noqa: A002
    w8a8.quantize(llama, tmp_path / "out", Options(format=format))
    found = w8a8.inspect(tmp_path / "out")
    assert found.w8a8
    assert found.scheme.startswith(format)
    assert found.parameters == w8a8.inspect(llama).parameters
    assert "lm_head" in found.excludes
    assert {row.dtype for row in found.components if row.component == "mlp"} == {"I8"}


@pytest.mark.parametrize("tool", ["quark-0.11.2", "quark-0.13", "llmcompressor-0.14.0.1"])
def test_other_tools_results_are_recognised(golden: Path, tool: str) -> None:
    assert w8a8.inspect(golden / tool).w8a8


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, not INT8 W8A8"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8, not INT8 W8A8"),
    ],
)
def test_other_schemes_are_named_not_guessed(llama: Path, config: dict[str, object], scheme: str) -> None:
    (llama / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": config}))
    found = w8a8.inspect(llama)
    assert (found.scheme, found.w8a8) == (scheme, False)


def test_only_headers_are_read(tmp_path: Path) -> None:
    """A 60 GB shard that is all hole opens at once: reading it would take a minute."""
    rows = [("model.layers.0.mlp.up_proj.weight", "BF16", (1 << 20, 30_000), 0, 2 * (1 << 20) * 30_000)]
    header = write_header(rows, {})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + rows[0][4])
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    found = w8a8.inspect(tmp_path)
    assert found.nbytes == rows[0][4]


def test_tensors_are_listed_only_if_asked(llama: Path) -> None:
    found = w8a8.inspect(llama)
    assert "specs" not in found.to_dict()
    assert {t["name"] for t in found.to_dict(tensors=True)["specs"]} == set(llama_tensors())
