"""`w8a8 chat`, as a user runs it: one-shot, piped, and in a terminal (a pty), with a real server and a checkpoint."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.command import W8A8, cli
from tests.serve.embedded.servers import KEY, make_checkpoint, serving, together
from tests.servers import Server, free_port
from w8a8.errors import ServerError, UsageError
from w8a8.serve.chat import connected

pytestmark = pytest.mark.engine

ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9"),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TERM": "dumb",
    "COLUMNS": "120",
}
"""With a proxy that nobody answers at: the servers of these tests are on this machine."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("chat-plain") / "plain", template=False)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Iterator[tuple[Server, ...]]:
    """One with a chat template and a key; one without either."""
    folder = make_checkpoint(tmp_path_factory.mktemp("chat") / "model", template=True)
    with together(serving(folder, "model", key=KEY), serving(plain, "plain")) as started:
        yield started


@pytest.fixture(scope="module")
def server(servers: tuple[Server, ...]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def completing(servers: tuple[Server, ...]) -> Server:
    return servers[1]


def chat(*arguments: str, stdin: str | None = None, key: str = KEY) -> "subprocess.CompletedProcess[str]":
    return cli("chat", *arguments, env={**ENVIRONMENT, "OPENAI_API_KEY": key}, stdin=stdin)


class Typist:
    """`w8a8 chat` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._fd, terminal = pty.openpty()
        # A fork of this process, with the threads it has, might never get as far as its exec: Popen's does.
        control = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", control, *W8A8, "chat", *arguments]
        environment = {**ENVIRONMENT, "OPENAI_API_KEY": KEY}
        self.process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True
        )
        os.close(terminal)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What appeared up to `text`."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self._fd], [], [], max(0, end - time.monotonic()))[0], f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self._fd, 4096).decode(errors="replace")
            except OSError as error:  # the other side has closed
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from error
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())
        self.wait_for(line)  # the terminal's echo

    def press(self, key: bytes) -> None:
        os.write(self._fd, key)

    def end(self) -> int:
        """The exit code, once it has ended."""
        while True:
            try:
                if not os.read(self._fd, 4096):
                    break
            except OSError:
                break
        return self.process.wait()


@pytest.fixture
def typist(server: Server) -> Iterator[Typist]:
    made = Typist(server.url, "--max-tokens", "8", "--temperature", "0")
    made.wait_for("> ")
    yield made
    made.process.kill()
    made.process.wait()


def test_one_shot_prints_the_answer_alone(server: Server) -> None:
    done = chat(server.url, "--prompt", " w8 w7", "--max-tokens", "12", "--temperature", "0")
    assert (done.returncode, done.stderr) == (0, "")
    expected = server.client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": " w8 w7"}], max_tokens=12, temperature=0
    )
    assert done.stdout == f"{expected.choices[0].message.content}\n"


def test_an_address_needs_no_scheme(server: Server) -> None:
    for address in (f"localhost:{server.port}/v1", f"127.0.0.1:{server.port}"):
        done = chat(address, "--prompt", " w8 w7", "--max-tokens", "2", "--json")
        assert json.loads(done.stdout)["completion_tokens"] == 2


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_json_has_the_text_the_usage_and_the_speed(server: Server, end: str) -> None:
    done = chat(server.url + end, "--prompt", " w8 w7", "--max-tokens", "30", "--json")
    answer = json.loads(done.stdout)
    assert (answer["model"], answer["finish_reason"]) == ("model", "length")
    assert (answer["prompt_tokens"], answer["completion_tokens"], len(answer["text"].split())) == (3, 30, 30)
    assert answer["tokens_per_second"] > 29 / answer["seconds"]


def test_standard_input_is_the_prompt_and_the_system_prompt_goes_before_it(server: Server) -> None:
    def tokens(*more: str) -> int:
        done = chat(server.url, "--json", "--max-tokens", "1", *more, stdin=" w8 w7 w6")
        return int(json.loads(done.stdout)["prompt_tokens"])

    assert tokens() == 4
    assert tokens("--system", " w1 w2") == 7


def test_a_model_without_a_template_completes_and_says_so(completing: Server) -> None:
    done = chat(completing.url, "--prompt", " w8 w7", "--max-tokens", "5", "--temperature", "0")
    assert "plain has no chat template: it completes the text" in done.stderr
    expected = completing.client.completions.create(model="plain", prompt=" w8 w7", max_tokens=5, temperature=0)
    assert done.stdout == f"{expected.choices[0].text}\n"


def test_a_model_without_a_template_takes_no_images(completing: Server, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    done = chat(completing.url, "--prompt", "a", "--image", str(picture))
    assert done.returncode == ServerError.exit_code
    assert "no chat template" in done.stderr


def test_a_checkpoint_is_served_for_as_long_as_it_takes(plain: Path) -> None:
    done = chat(str(plain), "--prompt", " w8 w7", "--max-tokens", "5", "--json", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert (answer["model"], answer["completion_tokens"]) == (str(plain), 5)


def test_a_checkpoint_computes_in_the_dtype_asked_for(plain: Path) -> None:
    with connected(str(plain), dtype="bfloat16") as found:
        url = str(found.client.base_url).removesuffix("/v1/")
        assert httpx.get(f"{url}/health", trust_env=False).json()["cache"]["dtype"] == "bfloat16"


def test_errors_are_one_line_and_say_what_to_do(server: Server, tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    ask = ("--prompt", "a")
    for arguments, code, said in (
        ((nobody, *ask), ServerError.exit_code, "not reachable; is the server running"),
        ((server.url, *ask, "--api-key", "wrong"), ServerError.exit_code, "wants another API key: --api-key"),
        ((f"{server.url}/nothing", *ask), ServerError.exit_code, "is it an OpenAI-compatible server?"),
        ((server.url, *ask, "--max-tokens", "9000"), ServerError.exit_code, "context is 8192 tokens"),
        ((server.url, *ask, "--image", str(picture)), ServerError.exit_code, "takes text only, no images"),
        ((server.url, *ask, "--image", __file__), UsageError.exit_code, "not an image in PNG"),
        ((server.url, *ask, "--image", str(tmp_path / "none")), UsageError.exit_code, "No such file"),
        ((server.url, "--prompt", " "), UsageError.exit_code, "the prompt is empty"),
        ((server.url, *ask, "--dtype", "float32"), UsageError.exit_code, "--dtype is for a checkpoint"),
        ((server.url, *ask, "--dtype", "int4"), UsageError.exit_code, "choose one of auto, bfloat16, float32"),
    ):
        done = chat(*arguments)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_in_a_terminal_it_answers_remembers_and_forgets(typist: Typist, server: Server) -> None:
    def expected(*said: str) -> str:
        roles = ("user", "assistant")
        messages: Any = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        made = server.client.chat.completions.create(model="model", messages=messages, max_tokens=8, temperature=0)
        return str(made.choices[0].message.content)

    typist.type("w5 w6")
    first = typist.wait_for("8 tokens (max tokens) in").strip()
    assert first == expected("w5 w6").strip()
    assert "tokens/s" in typist.wait_for("> ")
    typist.type("w5 w6")
    again = typist.wait_for("8 tokens").strip()
    assert again == expected("w5 w6", expected("w5 w6"), "w5 w6").strip() != first
    typist.wait_for("> ")
    typist.type("/clear")
    typist.wait_for("> ")
    typist.type("w5 w6")
    assert typist.wait_for("8 tokens").strip() == first


def test_in_a_terminal_commands_do_what_help_says(typist: Typist, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    for line, reply in (
        ("/help", "/image PATH"),
        ("/nothing", "no such command; /help lists them"),
        ("/image", "no such command"),
        (f"/image {__file__}", "not an image in PNG"),
        (f"/image {picture}", "1 to send with the next message"),
        (f"/image {picture}", "2 to send with the next message"),
        ("/clear", "\n"),
        (f"/image {picture}", "1 to send with the next message"),
        ("look", "takes text only, no images"),
        ("w5", "8 tokens"),
    ):
        typist.type(line)
        typist.wait_for(reply)
        typist.wait_for("> ")
    typist.type("/exit")
    assert typist.end() == 0


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(server: Server) -> None:
    typist = Typist(server.url, "--max-tokens", "8000")
    typist.wait_for("> ")
    typist.type("w5")
    typist.wait_for(" w")
    typist.press(b"\x03")
    typist.wait_for("stopped; ")
    typist.wait_for("> ")
    time.sleep(0.5)  # between showing the prompt and reading, readline would miss it until the next key
    typist.press(b"\x03")
    typist.wait_for("> ")
    typist.press(b"\x04")
    assert typist.end() == 0
