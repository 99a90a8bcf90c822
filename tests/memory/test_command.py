"""`w8a8 fit` as a user runs it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.checkpoints import LLAMA, llama_tensors, write_checkpoint
from tests.command import cli
from w8a8.errors import DoesNotFitError, NoConfigError, NoDeviceError, UsageError


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small Llama that says how many heads it has."""
    config = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return write_checkpoint(tmp_path / "llama", llama_tensors(), config=config)


def run(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return cli("fit", *arguments, env=environment)


def test_the_answer_is_drawn(llama: Path) -> None:
    done = run(llama, "--gpu", "8GiB:gfx1100", "--count", "2")
    assert done.returncode == 0, done.stderr
    assert "GPU 1" in done.stdout
    assert "fits: up to 4,096 tokens" in done.stdout
    assert done.stderr == ""


def test_json_holds_all_of_it(llama: Path) -> None:
    found = json.loads(run(llama, "--gpu", "8GiB", "--context", "100", "--concurrency", "3", "--json").stdout)
    assert found["fits"]
    assert (found["context"], found["concurrency"]) == (100, 3)
    assert found["needed"] == sum(found[part] for part in ("weights", "rotary", "activations", "engine", "kv"))
    assert found["gpus"][0]["memory"] == 8 * 2**30


def test_what_does_not_fit_has_an_exit_code_and_advice(llama: Path) -> None:
    done = run(llama, "--gpu", "1GiB", "--json")
    assert done.returncode == DoesNotFitError.exit_code
    assert not json.loads(done.stdout)["fits"]
    assert json.loads(done.stdout)["advice"]


def test_the_gpus_of_this_machine_are_taken_where_none_is_described(llama: Path, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "NVIDIA GeForce RTX 4090, 24564, 8.9"\n')
    tool.chmod(0o755)
    visible = {"CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": ""}
    done = run(llama, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **visible)
    assert "NVIDIA GeForce RTX 4090" in done.stdout


def test_where_there_is_no_gpu_one_is_asked_for(llama: Path) -> None:
    done = run(llama, CUDA_VISIBLE_DEVICES="", ROCR_VISIBLE_DEVICES="")
    assert done.returncode == NoDeviceError.exit_code
    assert "--gpu 24GiB" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("--gpu", "24"), ("--gpu", "2x8GiB", "--count", "4"), ("--gpu", "8GiB", "--count", "0")]
)
def test_a_garbled_request_is_refused(llama: Path, arguments: tuple[str, ...]) -> None:
    assert run(llama, *arguments).returncode == UsageError.exit_code


def test_a_checkpoint_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    embeddings = {name: t for name, t in llama_tensors().items() if "embed" in name}
    done = run(write_checkpoint(tmp_path / "table", embeddings), "--gpu", "8GiB")
    assert done.returncode == NoConfigError.exit_code
    assert "no decoder layers" in done.stderr
