"""`w8a8 eval gsm8k` as a user runs it, also on a checkpoint that it serves itself."""

import json
import os
import pty
import subprocess
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.evals.api import running_api
from tests.evals.gsm8k.runs import ENVIRONMENT, command, gsm8k
from w8a8.errors import UsageError
from w8a8.evals.gsm8k.results import read

pytestmark = pytest.mark.slow


def test_it_prints_a_table_or_json(data: Path, out: Path) -> None:
    with running_api() as api:
        arguments = ("--base-url", api.url.removesuffix("/v1"), "--data", str(data), "--out", str(out))
        table = gsm8k(*arguments, check=True)
        as_json = gsm8k(*arguments, "--json", check=True)
    assert "30.0%" in table.stdout
    assert str(out) in table.stdout
    assert "GSM8K: 20 of 20 questions, 30.0% right" in table.stderr
    assert json.loads(as_json.stdout) == read(out)


def test_in_a_terminal_it_shows_a_bar_with_the_accuracy(data: Path, out: Path) -> None:
    with running_api(delay=0.05) as api:
        arguments = ("--base-url", api.url, "--data", str(data), "--out", str(out), "--concurrency", "2")
        ours, terminal = pty.openpty()
        environment = {**ENVIRONMENT, "TERM": "xterm"}
        with subprocess.Popen(command(*arguments), env=environment, stderr=terminal, stdout=subprocess.DEVNULL):
            os.close(terminal)
            shown = b""
            try:
                while piece := os.read(ours, 65536):
                    shown += piece
            except OSError:  # the other side has closed
                pass
    os.close(ours)
    assert b"% right" in shown
    assert b"tokens/s" in shown
    assert b"20 of 20 questions" in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give --base-url"),
        (("--base-url", "http://localhost:1", "--ckpt", "x"), "give --base-url"),
        (("--base-url", "localhost:1"), "not an address"),
        (("--base-url", "http://localhost:99999"), "not an address"),
        (("--base-url", "http://[::1"), "not an address"),
        (("--base-url", "http://localhost:1", "--api-key", "schlüssel"), "printable ASCII"),
    ],
)
def test_it_needs_one_server(arguments: tuple[str, ...], complaint: str, data: Path) -> None:
    done = gsm8k(*arguments, "--data", str(data))
    assert done.returncode == UsageError.exit_code
    assert complaint in done.stderr


def test_a_checkpoint_is_served_for_as_long_as_it_takes(gemma4_w8a8: Path, data: Path, out: Path) -> None:
    arguments = ("--ckpt", str(gemma4_w8a8), "--engine", "transformers", "--data", str(data), "--out", str(out))
    how = ("--limit", "3", "--shots", "2", "--max-tokens", "8", "--json")
    done = gsm8k(*arguments, *how)
    assert done.returncode == 0, done.stderr
    found = read(out)
    assert found["model"] == str(gemma4_w8a8)
    assert found["versions"]["server"] == "w8a8"
    assert [o["error"] for o in found["outcomes"]] == [None] * 3
    assert 0 < found["tokens"]["completion"] <= 3 * 8
    with pytest.raises(URLError, match="refused"):
        urlopen(f"{found['base_url']}/models")


def test_a_checkpoint_without_a_chat_template_is_not_chatted_with(llama: Path, data: Path) -> None:
    (llama / "tokenizer_config.json").write_text("{}")
    arguments = ("--ckpt", str(llama), "--data", str(data))
    done = gsm8k(*arguments)
    assert done.returncode == UsageError.exit_code
    assert "--completions" in done.stderr
