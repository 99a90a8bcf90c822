"""`w8a8 serve` as a child process, and what its API says."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from openai import OpenAI

from tests.listening import free_port

START_SECONDS = 240


@dataclass(frozen=True)
class Server:
    """A running server: where it is, what it said on starting, and a client for it."""

    url: str
    model: str
    output: Path
    client: OpenAI


@contextmanager
def served(
    checkpoint: Path, engine: str, output: Path, *, environment: Path | None = None, arguments: tuple[str, ...] = ()
) -> Iterator[Server]:
    """`w8a8 serve CHECKPOINT --engine ENGINE`, ready; `environment` is where the engine's programs are."""
    port = free_port()
    command = [sys.executable, "-m", "w8a8", "serve", str(checkpoint), "--engine", engine, "--port", str(port)]
    with output.open("w") as log:
        process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env=_variables(environment))
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, output)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        yield Server(url, str(checkpoint), output, client)
    finally:
        process.terminate()
        assert process.wait(60) == 143, output.read_text()


def _variables(environment: Path | None) -> Mapping[str, str]:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if environment is not None:
        variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    return variables


def _wait(process: subprocess.Popen[bytes], url: str, output: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{output.read_text()[-4000:]}"
        try:
            with urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"not ready after {START_SECONDS} s:\n{output.read_text()[-4000:]}")
