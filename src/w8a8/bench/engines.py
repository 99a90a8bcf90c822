"""`w8a8 bench engines`: one small model in every engine that can be had here, INT8 in each, side by side.

Each engine is a process of its own that has loaded the model, and answers the same prompts when it is its turn, with as
many threads as there are cores. Three things are timed, for one request and for many at once: long prompts with one
token to answer, and short prompts with one token and with many. The first gives the speed at which prompts are read,
the difference of the others that at which answers are decoded. Servers are asked over HTTP, as their users ask them;
torchao runs in transformers' `generate`.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

from w8a8.bench.drivers import LLAMA_CPP, TORCHAO, driven
from w8a8.checkpoint import resolve
from w8a8.checkpoint.ggufs import is_gguf
from w8a8.conversion import convert
from w8a8.errors import NoDeviceError, UsageError, W8A8Error, first_line
from w8a8.evals.asking import Server
from w8a8.evals.server import HOST, free_port, serving
from w8a8.machine import usable_cores
from w8a8.quantization import quantize
from w8a8.serve import installed, process
from w8a8.serve.client import connect, explained
from w8a8.serve.vllm import Options, command
from w8a8.terminal.output import plain_table
from w8a8.terminal.wording import clean

LONG, SHORT = 1000, 60
"""Characters of the prompts: about 220 and 15 tokens of English."""

DECODED = 64
"""Tokens of an answer behind its first."""

CONTEXT = 1024
"""Tokens of the longest request that engines prepare for."""

LONGEST = 300
"""Seconds of a turn; an engine that needs more, by what its first answers take, is left out."""

KV_CACHE = 2 << 30
"""Bytes of vLLM's KV cache: more than all requests need."""


class Contender(Protocol):
    """An engine that has loaded the model."""

    def ask(self, prompts: Sequence[str], tokens: int) -> Mapping[str, Any]:
        """Answer all `prompts` at once, `tokens` tokens each: `seconds`, `prompt_tokens`, `completion_tokens`."""


@dataclass(frozen=True, slots=True)
class Row:
    """An engine: tokens per second of each turn, by the number of requests at once."""

    name: str
    prompt: Mapping[int, Sequence[float]]
    decode: Mapping[int, Sequence[float]]


@dataclass(frozen=True, slots=True)
class EnginesResult:
    """The table; `failed` holds the reason why an engine could not be had."""

    model: str
    threads: int
    rows: Sequence[Row]
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return every turn and the medians as plain JSON values."""
        rows = [
            {
                **asdict(row),
                **{
                    f"{kind}_median": {n: statistics.median(turns) for n, turns in getattr(row, kind).items()}
                    for kind in ("prompt", "decode")
                },
            }
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}


def bench(
    model: str,
    *,
    folder: Path,
    vllm: Path | None = None,
    runs: int = 5,
    requests: Sequence[int] = (1, 16),
    notice: Callable[[str], None] = lambda _: None,
) -> EnginesResult:
    """Prepare `model`, a GGUF file or a BF16 checkpoint, for every engine, and time them by turns.

    llama.cpp takes part where `model` is a GGUF file. `vllm` is the Python or the environment that has a vLLM. Raises
    the errors of converting and quantizing; an engine that cannot be had gets its reason in the result.
    """
    # 1) The model: in BF16 and in W8A8.
    home = folder.absolute() / "w8a8-bench-engines"
    shutil.rmtree(home, ignore_errors=True)
    gguf = Path(model).absolute() if is_gguf(Path(model)) else None
    notice("making the model in BF16 and in W8A8")
    bf16 = home / "bf16" if gguf else resolve(model).path
    if gguf:
        convert(gguf, bf16, "bf16")
    quantized = home / "w8a8"
    quantize(bf16, quantized)
    # 2) Every engine, as far as it can be had.
    threads = usable_cores()
    starts: dict[str, Callable[[], Any]] = {
        "w8a8 serve": partial(_embedded, quantized),
        "vLLM": partial(_vllm, quantized, vllm),
        TORCHAO.name: lambda: driven(TORCHAO.command(folder.absolute(), bf16, str(threads))),
        LLAMA_CPP.name: lambda: _llama_cpp(folder.absolute(), _given(gguf), threads, home / "q8_0.gguf", max(requests)),
    }
    engines, failed = {}, {}
    with ExitStack() as stack:
        for name, start in starts.items():
            notice(f"starting {name}")
            try:
                engine = stack.enter_context(start())
                warm_up(engine, requests)
                engines[name] = engine
            except W8A8Error as error:
                failed[name] = first_line(error)
        # 3) The turns.
        rows = race(engines, runs=runs, requests=requests, notice=notice)
    shutil.rmtree(home, ignore_errors=True)
    return EnginesResult(model, threads, rows, failed)


def warm_up(engine: Contender, requests: Sequence[int]) -> None:
    """Let an engine answer for the first time, and once more. Raises W8A8Error where a turn would take too long."""
    for _ in range(2):  # the first answers wait for what is compiled
        seconds = sum(engine.ask(_prompts(number, SHORT, 0), 2)["seconds"] for number in requests)
    turn = seconds * (LONG / SHORT + DECODED / 2)
    if turn > LONGEST:
        raise W8A8Error(f"a turn would take about {turn / 60:.0f} minutes here")


def race(
    engines: Mapping[str, Contender],
    *,
    runs: int,
    requests: Sequence[int],
    notice: Callable[[str], None] = lambda _: None,
) -> tuple[Row, ...]:
    """Let the engines answer by turns, `runs` times, and return how quick each was in each turn."""
    turns: dict[tuple[str, int], list[tuple[float, float]]] = {(name, n): [] for name in engines for n in requests}
    for run in range(runs):
        for name, engine in engines.items():
            for number in requests:
                prompt, decode = _turn(engine, number, run)
                turns[name, number].append((prompt, decode))
                notice(f"{run + 1}/{runs} {name}, {number} at once: {prompt:.0f} tokens/s read, {decode:.1f} decoded")
    return tuple(
        Row(name, *({n: [turn[kind] for turn in turns[name, n]] for n in requests} for kind in (0, 1)))
        for name in engines
    )


def _turn(engine: Contender, number: int, run: int) -> tuple[float, float]:
    """Return tokens per second of reading prompts and of decoding, for `number` requests at once."""
    read = engine.ask(_prompts(number, LONG, run), 1)
    short = _prompts(number, SHORT, run)
    one, many = engine.ask(short, 1), engine.ask(short, 1 + DECODED)
    decoded = many["completion_tokens"] - one["completion_tokens"]
    return read["prompt_tokens"] / read["seconds"], decoded / max(many["seconds"] - one["seconds"], 1e-9)


def _prompts(number: int, length: int, run: int) -> list[str]:
    """Cut `number` prompts of `length` characters out of some prose, no two with the same beginning."""
    prose = files("w8a8.bench").joinpath("prose.txt").read_text(encoding="utf-8")
    starts = (397 * (number * run + i) % (len(prose) - length) for i in range(number))
    return [f"{run}.{i} {prose[start : start + length]}" for i, start in enumerate(starts)]


def show(result: EnginesResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    rows = result.to_dict()["rows"]
    numbers = [*result.rows[0].prompt] if rows else []
    turns = len(result.rows[0].prompt[numbers[0]]) if rows else 0
    say(f"{clean(result.model)}, {result.threads} threads, medians of {turns}; tokens per second")
    kinds = (("prompt", "prompts"), ("decode", "decode"))
    table = plain_table("engine", *(f"{title}, {n} at once" for _, title in kinds for n in numbers), left=1)
    for row in rows:
        table.add_row(clean(row["name"]), *(f"{row[f'{kind}_median'][n]:.1f}" for kind, _ in kinds for n in numbers))
    say(table)
    for name, reason in result.failed.items():
        say(f"{clean(name)} is left out: {clean(reason)}")


class _Served:
    """A model behind an OpenAI-compatible API."""

    def __init__(self, server: Server, model: str) -> None:
        self._url, self._model = server.base_url, model
        self._client = connect(server.base_url, server.api_key, timeout=600, max_retries=0)

    def ask(self, prompts: Sequence[str], tokens: int) -> Mapping[str, Any]:
        """Send every prompt at once, each on a thread. Raises ServerError."""

        def complete(prompt: str) -> Any:
            how = {"model": self._model, "max_tokens": tokens, "temperature": 0, "extra_body": {"ignore_eos": True}}
            return self._client.completions.create(prompt=prompt, **how).usage

        start = time.perf_counter()
        with explained(self._url), ThreadPoolExecutor(len(prompts)) as pool:
            counts = list(pool.map(complete, prompts))
        return {
            "seconds": time.perf_counter() - start,
            "prompt_tokens": sum(count.prompt_tokens for count in counts),
            "completion_tokens": sum(count.completion_tokens for count in counts),
        }


@contextmanager
def _embedded(folder: Path) -> Iterator[Contender]:
    with serving(str(folder), engine="transformers", completions=True, timeout=600, notice=lambda _: None) as server:
        yield _Served(server, str(folder))


@contextmanager
def _vllm(folder: Path, where: Path | None) -> Iterator[Contender]:
    """Serve with the vLLM of the environment or Python `where`, or of this machine. Raises NoDeviceError."""
    python = where / "bin" / "python" if where and where.is_dir() else where
    found = installed.at(str(python)) if python else installed.find()
    if found is None or found.devices(()) is None:
        raise NoDeviceError("no vLLM for the CPU here; --vllm names an environment that has one")
    options = Options(host=HOST, port=free_port(), extra=("--no-enable-prefix-caching",))
    argv = command(str(folder), options, gpus=(), context=CONTEXT, kv_cache_bytes=KV_CACHE, int8=True)
    with (
        NamedTemporaryFile(prefix="w8a8-vllm-", suffix=".log") as log,
        process.running((*found.program, *argv[2:]), {}, log=log) as engine,
    ):
        engine.wait_until_ready(HOST, options.port)
        yield _Served(Server(f"http://{HOST}:{options.port}/v1", "none"), str(folder))


@contextmanager
def _llama_cpp(folder: Path, gguf: Path, threads: int, target: Path, requests: int) -> Iterator[Contender]:
    with driven(LLAMA_CPP.command(folder, gguf, target, *map(str, (threads, requests, CONTEXT)))) as engine:
        yield _Served(Server(f"{engine.address}/v1", "none"), str(target))


def _given(gguf: Path | None) -> Path:
    if gguf is None:
        raise UsageError("it reads GGUF files alone, and MODEL is none")
    return gguf
