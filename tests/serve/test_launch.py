"""`w8a8 serve` decides: which engine, which address, and what it refuses."""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.checkpoints import llama_tensors, write_checkpoint
from tests.serve import fake_vllm
from tests.serve.launching import CONFIG, install_nvidia_smi, run
from w8a8 import errors
from w8a8.serve.address import check_address

pytestmark = pytest.mark.slow

FP8 = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}


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
        (["--dtype", "float16"], errors.UsageError, "auto, bfloat16, float32"),
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


def test_the_command_says_what_is_computed(model: Path, vllm: dict[str, str]) -> None:
    for env in (vllm, {"PATH": ""}):
        assert "--dtype" not in run(model, "--dry-run", env=env).stdout
        assert "--dtype float32" in run(model, "--dry-run", "--dtype", "float32", env=env).stdout


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
