"""`w8a8 serve` as a user starts it, on machines that are made up."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.command import W8A8, cli
from tests.serve import fake_vllm
from tests.servers import Running, started

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


NO_KEYS = {"W8A8_API_KEY": "", "VLLM_API_KEY": ""}


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
