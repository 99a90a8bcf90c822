"""`w8a8 serve` starts an engine and ends it: whole processes, and a stand-in for vLLM."""

import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.serve import fake_vllm
from tests.serve.launching import run, serving
from w8a8 import errors
from w8a8.serve.process import telling

pytestmark = pytest.mark.slow


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
