"""`w8a8 serve` and memory: what fits on which GPUs and nodes, and the command that says so."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.checkpoints import llama_tensors
from tests.memory.reference import gemma4_31b
from tests.named import headers
from tests.serve import fake_vllm
from tests.serve.launching import CONFIG, install_nvidia_smi, run
from w8a8 import errors, machine
from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.header import write_header
from w8a8.machine import describe
from w8a8.memory import ram_needed
from w8a8.serve.place import place_embedded, place_vllm
from w8a8.serve.vllm import Options


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 4 31B W8A8: its config, and a file as long as the real one with a header and nothing behind it."""
    return write_hollow(tmp_path_factory.mktemp("reference") / "gemma-4-31b-it-W8A8", gemma4_31b())


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 TB, more than any machine's RAM."""
    tensors = {name: ("BF16", values.shape) for name, (_, values) in llama_tensors().items()}
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = ("BF16", (2**34, 64))
    return write_hollow(tmp_path_factory.mktemp("huge") / "model", headers(tensors, CONFIG | {"vocab_size": 2**34}))


def write_hollow(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint whose file has its true length, but a header alone in it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    rows, position = [], 0
    for tensor in checkpoint.tensors.values():
        rows.append((tensor.name, tensor.dtype, tensor.shape, position, position + tensor.nbytes))
        position += tensor.nbytes
    with (folder / "model.safetensors").open("wb") as file:
        file.write(write_header(rows, {"format": "pt"}))
        file.truncate(file.tell() + position)
    return folder


CARD = """\
# --host: vLLM's own default is every network this machine is in
vllm serve MODEL \\
  --tensor-parallel-size 4 \\
  --max-model-len 8192 \\
  --gpu-memory-utilization 0.9 \\
  --limit-mm-per-prompt '{"image":0,"audio":0,"video":0}' \\
  --trust-remote-code \\
  --linear-backend triton \\
  --host 127.0.0.1

# once it is ready:
curl http://localhost:8000/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{"model": "MODEL", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}'
"""
"""What the reference model's card says for 4 x 24 GB of RDNA3, and what this tool adds to it."""


def test_the_reference_model_s_card_is_what_a_dry_run_prints(gemma4: Path) -> None:
    arguments = ("--describe", "4x24GiB:gfx1100", "--text-only", "--trust-remote-code", "--dry-run")
    done = run(gemma4, *arguments, env={"PATH": ""})
    assert done.stdout.replace(str(gemma4), "MODEL") == CARD
    assert "memory allows --max-model-len" in done.stderr
    values = json.loads(run(gemma4, *arguments, "--json", env={"PATH": ""}).stdout)
    assert (values["engine"], values["argv"][:3]) == ("vllm", ["vllm", "serve", str(gemma4)])
    assert values["argv"][3:5] == ["--tensor-parallel-size", "4"]
    memory, kernel = values["notices"]
    assert "memory allows --max-model-len" in memory
    assert kernel.startswith("INT8 kernel: w8a8's Triton kernel where its plugin is")


@pytest.mark.parametrize(
    ("gpus", "arguments", "error", "mention"),
    [
        ("24GiB", [], errors.DoesNotFitError, "48 GiB"),
        ("48GiB", ["--max-model-len", "200000"], errors.DoesNotFitError, "200,000 tokens"),
        ("48GiB", ["--max-model-len", "300000"], errors.UsageError, "262144"),
        ("4x24GiB", ["--tensor-parallel-size", "3"], errors.UsageError, "evenly"),
        ("2x48GiB", ["--tensor-parallel-size", "4"], errors.UsageError, "2 GPUs"),
    ],
)
def test_what_cannot_be_placed_on_the_gpus_is_refused_before_it_is_loaded(
    gemma4: Path, gpus: str, arguments: list[str], error: type[errors.W8A8Error], mention: str
) -> None:
    done = run(gemma4, "--describe", gpus, "--dry-run", "--text-only", *arguments)
    assert done.returncode == error.exit_code, done.stderr
    assert mention in done.stderr


def test_gpus_and_nodes_are_used_as_far_as_the_model_can_be_shared(gemma4: Path) -> None:
    def argv(*arguments: str) -> list[str]:
        return list(json.loads(run(gemma4, "--dry-run", "--json", *arguments).stdout)["argv"])

    assert argv("--describe", "3x48GiB")[3:5] == ["--tensor-parallel-size", "2"]
    assert argv("--describe", "4x48GiB", "--tensor-parallel-size", "2")[3:5] == ["--tensor-parallel-size", "2"]
    assert argv("--describe", "2x16GiB", "--nodes", "2")[3:9] == [
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"),
        *("--distributed-executor-backend", "ray"),
    ]


def test_who_passes_on_a_flag_about_memory_leaves_the_judgement_to_vllm(gemma4: Path) -> None:
    done = run(gemma4, "--describe", "16GiB", "--dry-run", "--", "--cpu-offload-gb", "30")
    assert done.returncode == 0, done.stderr
    assert "--cpu-offload-gb 30" in done.stdout


def test_nodes_are_for_gpus_and_need_ray(model: Path, tmp_path: Path, vllm: dict[str, str]) -> None:
    assert run(model, "--nodes", "2", "--dry-run", env=vllm).returncode == errors.UsageError.exit_code
    cuda = fake_vllm.install(tmp_path / "cuda", "0.32.0")
    install_nvidia_smi(Path(cuda["PATH"]))
    done = run(model, "--nodes", "2", env=cuda)
    assert done.returncode == errors.MissingExtraError.exit_code
    assert "pip install ray" in done.stderr


def test_float32_needs_place_for_weights_twice_as_large(gemma4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers, context = Checkpoint.open(gemma4), 4096
    monkeypatch.setattr(machine, "available_memory", lambda: ram_needed(headers, context) + 10**9)
    stored, float32 = (Options(max_model_len=context, dtype=dtype) for dtype in ("auto", "float32"))
    assert place_embedded("m", headers, (), stored) == context
    with pytest.raises(errors.DoesNotFitError):
        place_embedded("m", headers, (), float32)
    for options, judged in ((stored, True), (float32, False)):  # vLLM judges itself
        gpu = describe("24GiB")
        with pytest.raises(errors.DoesNotFitError) if judged else nullcontext():
            place_vllm("m", headers, gpu, options)


def test_too_little_ram_is_an_error_for_both_engines(huge: Path, vllm: dict[str, str]) -> None:
    for engine in ("vllm", "transformers"):
        done = run(huge, "--engine", engine, env=vllm)
        assert done.returncode == errors.DoesNotFitError.exit_code, done.stderr
        assert "RAM" in done.stderr
    assert fake_vllm.started(vllm) is None
