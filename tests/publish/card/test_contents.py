"""What the card says of the checkpoint, and that its commands do what they say."""

import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import w8a8
from tests.calibrate.checkpoints import make as make_small
from tests.calibrate.checkpoints import write_text
from tests.checkpoints import folder_bytes
from tests.command import cli
from tests.publish.card.reading import SECTIONS, blocks, details, metadata, rows
from w8a8.checkpoint import Checkpoint
from w8a8.errors import DoesNotFitError
from w8a8.machine import describe
from w8a8.memory import fit
from w8a8.publish.card.write import make
from w8a8.quantization import Options
from w8a8.terminal.wording import count, size

pytestmark = pytest.mark.slow


def check_against_files(text: str, source: Path, out: Path) -> None:
    """Every number is that of the files."""
    made, original = Checkpoint.open(out), Checkpoint.open(source)
    found = details(text)
    assert found["Parameters"] == count(original.numel)
    assert found["Model Size"] == f"~{size(made.nbytes)} ({len(made.shards)} safetensors shards)"
    assert found["Original Size"] == f"~{size(original.nbytes)}"
    assert found["Compression"] == f"~{original.nbytes / made.nbytes:.1f}x size reduction"
    assert found["Architecture"] == ", ".join(made.config["architectures"])
    quantized = [t for t in made.tensors.values() if t.dtype == "I8"]
    assert f"- {len(quantized)} tensors quantized:" in text
    scheme = rows(text, "Quantization Scheme")
    assert ["Activation (inputs of these layers)", "INT8", "per token, symmetric", "dynamic"] in scheme
    assert ["Weight (mlp)", "INT8", "per output channel, symmetric", "static"] in scheme
    for gpus, needed, context, longest in rows(text, "Hardware Requirements")[1:]:
        fits = fit(out, describe(gpus))
        assert fits.fits
        assert (needed, context, longest) == (size(fits.needed), f"{fits.context:,}", f"{fits.max_context:,}")


def test_the_card_of_a_real_gemma_3(gemma3: Path, gemma3_w8a8: Path) -> None:
    text = make(gemma3_w8a8).text
    check_against_files(text, gemma3, gemma3_w8a8)
    data = metadata(text)
    assert data["pipeline_tag"] == "text-generation"
    assert {"int8", "w8a8", "vllm", Checkpoint.open(gemma3_w8a8).config["quantization_config"]["quant_method"]} <= set(
        data["tags"]
    )
    assert ["lm_head (the embeddings again)", "BF16", "", "unquantized"] in rows(text, "Quantization Scheme")
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS


def test_the_card_of_a_gemma_4_that_sees(gemma4: Path, gemma4_w8a8: Path) -> None:
    text = make(gemma4_w8a8, base_model="google/gemma-4-31b-it").text
    check_against_files(text, gemma4, gemma4_w8a8)
    data = metadata(text)
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["base_model"] == "google/gemma-4-31b-it"
    assert data["base_model_relation"] == "quantized"
    assert ["vision tower", "BF16", "", "unquantized"] in rows(text, "Quantization Scheme")
    assert "AutoModelForImageTextToText" in text
    assert "/v1/chat/completions" in text


def test_the_vllm_command_is_what_serve_prints(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    for gpus in ("24GiB", "2x24GiB:gfx1100"):
        run = cli("serve", out.name, "--describe", gpus, "--dry-run")
        command, _, call = run.stdout.partition("\n\n# once it is ready:\n")
        written = blocks(make(out, describe=gpus).text)
        assert command.partition("\n")[2] + "\n" == written[0]
        assert call == written[1]


def test_examples_name_the_repository_once_it_is_known(out: Path) -> None:
    text = make(out, repo="me/llama-W8A8").text
    assert blocks(text)[0].startswith("vllm serve me/llama-W8A8 ")
    assert '"model": "me/llama-W8A8"' in blocks(text)[1]


def test_gpus_too_small_for_it_are_refused(out: Path) -> None:
    with pytest.raises(DoesNotFitError):
        make(out, describe="0.1GiB")


def test_a_model_for_several_gpus_gets_an_example_with_as_many(
    gemma3_w8a8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w8a8.publish.card.usage.ONE_GPU", "0.5GiB")
    assert "--tensor-parallel-size 4" in make(gemma3_w8a8).text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "llm-compressor-0.14"},
        {"format": "compressed-tensors", "include": ["fusion"], "exclude": ["*.layers.0.*", "*.down_proj"]},
    ],
)
def test_the_command_in_the_card_makes_the_same_checkpoint(
    source: Path, options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = source.with_name("llama-W8A8")
    w8a8.quantize(source, out, Options(**options))
    check_commands(out, monkeypatch)


def test_the_command_in_the_card_calibrates_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source, text, out = make_small(tmp_path / "llama"), write_text(tmp_path), tmp_path / "llama-W8A8"
    command = ("quantize", source, out, "--recipe", "smooth", "--calibration", text, "--keep-bf16", "10%")
    run = cli(*command, "--tokens", "48", "--exclude", "*.layers.1.mlp.*")
    assert run.returncode == 0, run.stderr
    card = make(out).text
    assert re.search(r"Calibrated on \d+ samples of 48 tokens of miller\.txt \(SHA-256 `[0-9a-f]{64}`\)", card)
    assert "No calibration data" not in card
    check_commands(out, monkeypatch)


def check_commands(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card says makes the same files again."""
    [commands] = [b for b in blocks(make(out).text) if b.startswith("w8a8 quantize")]
    expected = folder_bytes(out)
    shutil.rmtree(out)

    monkeypatch.chdir(out.parent)
    for command in commands.replace("\\\n", "").strip().splitlines():
        program, *arguments = shlex.split(command)
        assert program == "w8a8"
        run = cli(*arguments)
        assert run.returncode == 0, run.stderr
    assert folder_bytes(out) == expected
