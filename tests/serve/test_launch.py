"""`w8a8 serve` as a user meets it: whole processes, and a stand-in for vLLM where starting and stopping is tested."""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import llama_tensors, write_checkpoint
from tests.command import W8A8, cli
from tests.memory.reference import gemma4_31b
from tests.named import headers
from tests.serve import fake_vllm
from tests.servers import Running, free_port, started
from w8a8 import errors
from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.header import write_header
from w8a8.serve.address import check_address
from w8a8.serve.calling import Call, can_chat
from w8a8.serve.process import telling

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
}
FP8 = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
NO_KEYS = {"W8A8_API_KEY": "", "VLLM_API_KEY": ""}


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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small Llama that an engine would be told to load; nothing here does."""
    return write_checkpoint(tmp_path / "model", llama_tensors(), config=CONFIG)


@pytest.fixture
def vllm(tmp_path: Path) -> dict[str, str]:
    """An environment with the stand-in, as a CPU build."""
    return NO_KEYS | fake_vllm.install(tmp_path / "vllm", "0.32.0+cpu")


@pytest.fixture
def port() -> int:
    return free_port()


def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return cli("serve", *arguments, env=NO_KEYS | dict(env or {}))


@contextmanager
def serving(*arguments: str | Path, env: Mapping[str, str]) -> Iterator[Running]:
    """`w8a8 serve` while it runs; what is left of it at the end is killed."""
    try:
        with started([*W8A8, "serve", *arguments], Path(env[fake_vllm.FOLDER]) / "log", env) as it:
            yield it
    finally:
        for pid in (fake_vllm.started(env) or {"pids": []})["pids"]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def install_nvidia_smi(folder: Path) -> None:
    """Make this a machine with two GPUs."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 9.0'\necho 'NVIDIA H200, 143771, 9.0'\n")
    program.chmod(0o755)


def eventually_gone(pids: list[int]) -> bool:
    """Whether all of them end; a dead one nobody has waited for counts as ended."""

    def runs(pid: int) -> bool:
        try:
            return " Z " not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        except FileNotFoundError:
            return False

    for _ in range(200):
        if not any(map(runs, pids)):
            return True
        time.sleep(0.05)
    return False


def pids(env: Mapping[str, str]) -> list[int]:
    values = fake_vllm.started(env)
    assert values
    return list(values["pids"])


def request(curl: str, **variables: str) -> Any:
    """Send what a curl line says, as a shell would read it."""
    words = shlex.split(curl.replace("\\\n", ""))
    headers = [words[i + 1] for i, word in enumerate(words) if word == "-H"]
    for name, value in variables.items():
        headers = [header.replace(f"${name}", value) for header in headers]
    data = words[words.index("-d") + 1].encode()
    pairs = dict(header.split(": ", 1) for header in headers)
    with urllib.request.urlopen(urllib.request.Request(words[1], data, pairs)) as answer:
        return json.load(answer)


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


def test_too_little_ram_is_an_error_for_both_engines(huge: Path, vllm: dict[str, str]) -> None:
    for engine in ("vllm", "transformers"):
        done = run(huge, "--engine", engine, env=vllm)
        assert done.returncode == errors.DoesNotFitError.exit_code, done.stderr
        assert "RAM" in done.stderr
    assert fake_vllm.started(vllm) is None


def test_when_it_is_ready_it_says_how_to_call_it_and_that_works(model: Path, vllm: dict[str, str], port: int) -> None:
    with serving(model, "--port", str(port), env=vllm | {"W8A8_API_KEY": "s3cret"}) as server:
        said = server.wait_for("in Python")
        curl = said[said.index("curl ") : said.index("\n\nin Python")]
        answer = request(curl, W8A8_API_KEY="s3cret")
    assert "the engine speaks" in said
    assert "s3cret" not in said
    assert (answer["model"], answer["path"]) == (str(model), "/v1/chat/completions")
    assert answer["key"] == "Bearer s3cret"


def test_a_base_model_is_called_for_completions(model: Path, vllm: dict[str, str], port: int) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    with serving(model, "--port", str(port), env=vllm) as server:
        said = server.wait_for("in Python")
        assert request(said[said.index("curl ") : said.index("\n\nin Python")])["path"] == "/v1/completions"


def test_a_chat_template_passed_on_counts(model: Path, vllm: dict[str, str]) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    assert "/v1/completions" in run(model, "--dry-run", env=vllm).stdout
    assert "/v1/chat/completions" in run(model, "--dry-run", "--", "--chat-template", "x", env=vllm).stdout


def test_vllm_gets_its_arguments_and_the_key_where_ps_does_not_show_it(
    model: Path, vllm: dict[str, str], port: int
) -> None:
    arguments = (
        model,
        "--port",
        str(port),
        "--api-key",
        "s3cret",
        "--",
        "--max-num-seqs",
        "4",
        "--max-model-len",
        "512",
    )
    with serving(*arguments, env=vllm) as server:
        server.wait_for("ready in")
    started = fake_vllm.started(vllm)
    assert started
    assert started["api_key"] == "s3cret"
    assert "s3cret" not in started["argv"]
    assert started["argv"][:2] == ["serve", str(model)]
    assert started["argv"][-4:] == ["--max-num-seqs", "4", "--max-model-len", "512"]
    assert started["argv"].count("--max-model-len") == 1


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["the engine speaks", "in Python"])
def test_an_interrupt_ends_all_it_started(
    model: Path, vllm: dict[str, str], port: int, sent: signal.Signals, code: int, when: str
) -> None:
    with serving(model, "--port", str(port), env=vllm) as server:
        server.wait_for(when)
        server.process.send_signal(sent)
        assert server.process.wait(60) == code
        assert "all it started has ended" in server.said()
        assert eventually_gone(pids(vllm))


def test_a_second_ctrl_c_ends_an_engine_that_lingers(model: Path, vllm: dict[str, str], port: int) -> None:
    with serving(model, "--port", str(port), env=vllm | {fake_vllm.MANNER: "linger"}) as server:
        server.wait_for("in Python")
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 130  # of the 20 s of grace
        assert eventually_gone(pids(vllm))


@pytest.mark.parametrize("when", ["the engine speaks", "in Python"])
@pytest.mark.parametrize("manner", ["", "linger"])
def test_when_it_is_killed_the_engine_ends_too(
    model: Path, vllm: dict[str, str], port: int, manner: str, when: str
) -> None:
    with serving(model, "--port", str(port), env=vllm | {fake_vllm.MANNER: manner}) as server:
        server.wait_for(when)
        server.process.kill()
        server.process.wait()
        assert eventually_gone(pids(vllm))


def test_an_engine_that_fails_is_an_error_with_its_reason(model: Path, vllm: dict[str, str], port: int) -> None:
    done = run(model, "--port", str(port), env=vllm | {fake_vllm.MANNER: "fail"})
    assert done.returncode == errors.EngineError.exit_code
    assert done.stderr.splitlines()[-1].endswith(
        "exit code 1; all it said is above. In short: ValueError: no room for the KV cache / "
        "RuntimeError: Engine core initialization failed"
    )
    assert eventually_gone(pids(vllm))


def test_an_engine_that_falls_over_later_is_an_error_too(model: Path, vllm: dict[str, str], port: int) -> None:
    done = run(model, "--port", str(port), env=vllm | {fake_vllm.MANNER: "fall"})
    assert done.returncode == errors.EngineError.exit_code
    assert "ready in" in done.stderr
    assert "exit code 3" in done.stderr


def test_errors_are_told_from_the_rest_the_cause_first() -> None:
    log = "INFO a\nWARNING OSError: no harm\n\x1b[1mKeyError: 'a'\x1b[0m\nb\nKeyError: 'a'\nRuntimeError: see above\n\n"
    assert telling(log) == "In short: KeyError: 'a' / RuntimeError: see above"
    assert telling("one\ntwo\n\n") == "In short: one / two"
    assert telling("") == "It said nothing."


def test_a_port_in_use_is_found_before_anything_is_started(model: Path, vllm: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for engine in ("vllm", "transformers"):
            done = run(model, "--port", port, "--engine", engine, env=vllm)
            assert done.returncode == errors.PortInUseError.exit_code
            assert f"port {port} is taken" in done.stderr
        done = run(model, "--", "--port", port, env=vllm)
        assert done.returncode == errors.PortInUseError.exit_code
    assert fake_vllm.started(vllm) is None


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a" * 300, "\0"])
def test_an_address_that_is_not_here_is_an_error_that_names_it(host: str) -> None:
    with pytest.raises(errors.PortInUseError):
        check_address(host, 8000)


@pytest.mark.parametrize(
    ("arguments", "error", "mention"),
    [
        (["--engine", "llama.cpp"], errors.UsageError, "auto, transformers, vllm"),
        (["--describe", "24GiB"], errors.UsageError, "--dry-run"),
        (["--describe", "24 gigs", "--dry-run"], errors.UsageError, "24 gigs"),
        (["--engine", "transformers", "--text-only", "--", "-x"], errors.UsageError, "--text-only"),
        (["another"], errors.UsageError, "another"),
        (["--engine", "transformers", "--max-model-len", "4096"], errors.UsageError, "2048"),
        (["--api-key", ""], errors.UsageError, "API key"),
        (["--api-key", "a\nb"], errors.UsageError, "API key"),
        (["--engine", "vllm"], errors.MissingExtraError, "pip install vllm"),
        (["--text-only"], errors.MissingExtraError, "--text-only"),
        (["--", "--port", "http"], errors.MissingExtraError, "after --"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    model: Path, arguments: list[str], error: type[errors.W8A8Error], mention: str
) -> None:
    done = run(model, *arguments, env={"PATH": ""})
    assert done.returncode == error.exit_code, done.stderr
    assert mention in done.stderr.splitlines()[-1]


def test_what_is_no_checkpoint_is_refused_by_both_engines(tmp_path: Path, vllm: dict[str, str]) -> None:
    for engine in ("vllm", "transformers"):
        assert run(tmp_path, "--engine", engine, env=vllm).returncode == errors.NoConfigError.exit_code


def test_another_scheme_is_vllm_s_business_but_not_the_embedded_engine_s(tmp_path: Path, vllm: dict[str, str]) -> None:
    model = write_checkpoint(tmp_path / "fp8", llama_tensors(), config=CONFIG | FP8)
    done = run(model, "--engine", "transformers", "--dry-run")
    assert done.returncode == errors.UnsupportedSchemeError.exit_code
    assert "fp8" in done.stderr
    done = run(model, "--dry-run", env=vllm)
    assert done.returncode == 0
    assert "fp8" in done.stderr


def test_auto_takes_vllm_where_it_has_a_device(model: Path, tmp_path: Path, vllm: dict[str, str]) -> None:
    def chosen(env: Mapping[str, str]) -> str:
        return str(json.loads(run(model, "--dry-run", "--json", env=env).stdout)["engine"])

    assert chosen(vllm) == "vllm"
    assert chosen({"PATH": ""}) == "transformers"
    cuda = fake_vllm.install(tmp_path / "cuda", "0.32.0")
    assert chosen(cuda) == "transformers"
    done = run(model, "--engine", "vllm", env=cuda)
    assert done.returncode == errors.NoDeviceError.exit_code
    assert "cuda" in done.stderr
    install_nvidia_smi(Path(cuda["PATH"]))
    assert chosen(cuda) == "vllm"
    assert chosen(cuda | {"CUDA_VISIBLE_DEVICES": ""}) == "transformers"
    rocm = fake_vllm.install(tmp_path / "rocm", "0.32.0+rocm700")
    assert chosen(rocm | {"PATH": f"{rocm['PATH']}{os.pathsep}{cuda['PATH']}"}) == "transformers"


def test_dry_run_starts_nothing_and_tries_no_port(model: Path, vllm: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run(model, "--dry-run", "--port", str(taken.getsockname()[1]), env=vllm)
    assert done.returncode == 0, done.stderr
    assert fake_vllm.started(vllm) is None


def test_the_key_is_never_printed(model: Path, vllm: dict[str, str]) -> None:
    by_variable = run(model, "--dry-run", env=vllm | {"W8A8_API_KEY": "s3cret"})
    by_argument = run(model, "--dry-run", "--api-key", "s3cret", env=vllm)
    assert "VLLM_API_KEY=$W8A8_API_KEY vllm serve" in by_variable.stdout
    assert "VLLM_API_KEY=YOUR_KEY vllm serve" in by_argument.stdout
    assert "s3cret" not in by_variable.stdout + by_variable.stderr + by_argument.stdout + by_argument.stderr


def test_listening_to_a_network_without_a_key_is_pointed_out(model: Path, vllm: dict[str, str]) -> None:
    assert "--api-key" in run(model, "--dry-run", "--host", "0.0.0.0", env=vllm).stderr
    assert "--api-key" not in run(model, "--dry-run", "--host", "0.0.0.0", "--api-key", "k", env=vllm).stderr


@pytest.mark.parametrize(
    ("files", "chat"),
    [
        ({}, True),  # headers alone: not known
        ({"tokenizer_config.json": "{}"}, False),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, True),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": ""}, True),
        ({"tokenizer_config.json": "{}", "chat_template.json": '{"chat_template": "x"}'}, True),
        ({"tokenizer_config.json": "[garbled"}, True),
    ],
)
def test_a_chat_template_is_found_wherever_it_stands(tmp_path: Path, files: dict[str, str], chat: bool) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert can_chat(str(tmp_path)) is chat


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://localhost:80/v1"), ("::1", "http://[::1]:80/v1"), ("0.0.0.0", "http://localhost:80/v1")],
)
def test_a_url_that_clients_can_use_is_made_of_what_is_listened_on(host: str, url: str) -> None:
    assert Call(host, 80, "m", chat=True).url == url
