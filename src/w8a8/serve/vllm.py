"""The command that starts vLLM, as a pure function of the GPUs and the user's options.

Flags and rules are those of vLLM 0.32. Over several nodes each node holds a stage of the pipeline, split over its own
GPUs, as vLLM's documentation on distributed serving lays it out. Arguments that the user passes on stand last in the
command, so that they win, and a flag among them is not set by us as well.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from w8a8.errors import UsageError
from w8a8.machine import Gpu
from w8a8.vllm_plugin.rule import cutlass_fails

TEXT_ONLY = '{"image":0,"audio":0,"video":0}'
"""`--limit-mm-per-prompt` for text alone: vLLM loads no encoder. A model without encoders ignores it."""

DTYPES = ("auto", "bfloat16", "float32")
"""What a model can be made to compute in, whatever it is stored in; auto: the stored dtype."""

PORT = 8000
"""The port vLLM listens on unless told otherwise."""

_SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The user's choices; `extra` goes to vLLM unchanged. `gpu_memory_utilization` is a share of each GPU."""

    host: str = "127.0.0.1"
    port: int = PORT
    max_model_len: int | None = None
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    text_only: bool = False
    tensor_parallel_size: int | None = None
    nodes: int = 1
    trust_remote_code: bool = False
    extra: tuple[str, ...] = ()


def check_dtype(dtype: str) -> None:
    """Raise UsageError for a dtype that `--dtype` does not take."""
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")


def command(
    model: str,
    options: Options,
    *,
    gpus: Sequence[Gpu],
    context: int,
    kv_cache_bytes: int | None = None,
    revision: str | None = None,
    int8: bool = False,
) -> list[str]:
    """Return `vllm serve MODEL ...` for a model split over `gpus`, those of each node; none means a CPU.

    `context` is the longest request in tokens. On a CPU `kv_cache_bytes` is the KV cache's size: there vLLM takes its
    memory utilization as a share of all RAM, and does not start if others have taken part of that. `int8`: whether the
    model's layers are INT8 W8A8.
    """
    argv = ["vllm", "serve", model]
    passed_on = given(options.extra)
    for flag, *value in _flags(options, gpus, context, kv_cache_bytes, revision, int8):
        if flag not in passed_on:
            argv += [flag, *value]
    return [*argv, *options.extra]


def _flags(
    options: Options,
    gpus: Sequence[Gpu],
    context: int,
    kv_cache_bytes: int | None,
    revision: str | None,
    int8: bool,
) -> Iterator[tuple[str, ...]]:
    if gpus:
        yield "--tensor-parallel-size", str(len(gpus))
    if options.nodes > 1:
        yield "--pipeline-parallel-size", str(options.nodes)
        yield "--distributed-executor-backend", "ray"
    yield "--max-model-len", str(context)
    if gpus:
        yield "--gpu-memory-utilization", f"{options.gpu_memory_utilization:g}"
    elif kv_cache_bytes:
        yield "--kv-cache-memory-bytes", str(kv_cache_bytes)
    if options.dtype != "auto":
        yield "--dtype", options.dtype
    if options.text_only:
        yield "--limit-mm-per-prompt", TEXT_ONLY
    if options.trust_remote_code:
        yield ("--trust-remote-code",)
    # vLLM's INT8 kernels of AITER are for the Instinct line only, and those of CUTLASS end with Hopper.
    if any(gpu.is_rdna or (int8 and cutlass_fails(gpu.arch)) for gpu in gpus):
        yield "--linear-backend", "triton"
    if revision:
        yield "--revision", revision
    yield "--host", options.host  # vLLM's own default is every interface
    if options.port != PORT:
        yield "--port", str(options.port)


def given(extra: Sequence[str]) -> dict[str, str]:
    """Find the flags among vLLM's arguments, spelled in full, each with the first word of its value."""
    found = {}
    for word, following in zip(extra, (*extra[1:], "-"), strict=False):
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            flag = _SHORT.get(flag, flag).replace("_", "-").split(".")[0]
            found[flag] = value if equals else "" if following.startswith("-") else following
    return found


def shell(argv: Sequence[str]) -> str:
    """Quote `argv` for a shell, with a line for each flag and its values."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("-"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(map(shlex.join, lines))
