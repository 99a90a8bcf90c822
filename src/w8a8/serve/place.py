"""Where an engine will run: over which GPUs vLLM splits the model, and how long a request the memory allows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from w8a8 import machine
from w8a8.checkpoint import Checkpoint
from w8a8.errors import DoesNotFitError, UsageError
from w8a8.machine import Gpu, gigabytes
from w8a8.memory import Fit, fit, ram_needed
from w8a8.memory.fit import DEFAULT_CONTEXT as CONTEXT
from w8a8.memory.model import Model
from w8a8.serve.vllm import Options, given

MIN_CONTEXT = 1024
"""Tokens that must fit for a model to be served unasked: fewer are hardly enough to chat."""

CPU_PROCESSES = 3 * 2**30
"""Bytes that vLLM's three processes take on a CPU beyond those on a GPU (4.0 GB in all, measured with 0.32)."""

CPU_REQUESTS = 16
"""Requests of full length that vLLM's KV cache has room for on a CPU, memory permitting; on a GPU it takes all."""

CPU_BLOCKS = 1.25
"""vLLM's blocks are 128 tokens long on a CPU instead of 16, so that more of them end half empty."""

_ABOUT_MEMORY = {
    *("--max-model-len", "--gpu-memory-utilization", "--kv-cache-memory-bytes", "--kv-cache-dtype", "--cpu-offload-gb"),
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--quantization", "--dtype", "--config"),
}
"""Flags of vLLM that change whether a model fits: with one of them passed on, vLLM judges."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where vLLM runs: the GPUs of a node it is split over (none: on the CPU), and the context that fits there."""

    gpus: Sequence[Gpu]
    context: int
    kv_cache_bytes: int | None = None
    notices: tuple[str, ...] = ()


def place_vllm(checkpoint: str, headers: Checkpoint, devices: Sequence[Gpu], options: Options) -> Place:
    """Split over the most of `devices` that can share the model, or as many as asked for; with none, use the RAM.

    Raises `UsageError` for a split or a context that cannot be, `DoesNotFitError` with what would help.
    """
    # 1) The memory: of each GPU, or of the machine.
    size = options.tensor_parallel_size
    if size and size > len(devices):
        raise UsageError(f"--tensor-parallel-size {size}: there are {len(devices)} GPUs on a node")
    # A node holds one stage of the pipeline, so that each of its GPUs holds a part of that stage only.
    gpus = [replace(gpu, memory=gpu.memory * options.nodes) for gpu in devices[:size]]
    besides = 0 if gpus else CPU_PROCESSES
    gpus = gpus or [Gpu("RAM", max(1, machine.available_memory() - besides))]

    def fitted(context: int, requests: int = 1) -> Fit:
        share, text = options.gpu_memory_utilization, options.text_only
        return fit(headers, gpus, context=context, concurrency=requests, utilization=share, text_only=text)

    # 2) The split: every GPU must hold an equal share.
    found = fitted(options.max_model_len or CONTEXT)
    if size and found.tensor_parallel != size:
        raise UsageError(f"--tensor-parallel-size {size} cannot share this model evenly; {found.tensor_parallel} can")

    # 3) The context: as asked for, else the default, as far as model and memory allow.
    _check_length(options, found.model_context)
    longest, least = found.max_context, options.max_model_len or min(MIN_CONTEXT, found.model_context)
    vllm_judges = given(options.extra).keys() & _ABOUT_MEMORY or options.dtype == "float32"
    if longest < least and not vllm_judges:
        where = "each GPU's memory" if devices else "RAM"
        advice = f". `w8a8 fit` says what would help: {'; '.join(found.advice)}" if devices and found.advice else ""
        raise DoesNotFitError(
            f"{checkpoint}: with {found.context:,} tokens vLLM needs {gigabytes(found.needed + besides)} of "
            f"{where}, of which it may use {gigabytes(found.budget + besides)}{advice}"
        )
    context = options.max_model_len or min(CONTEXT, longest or CONTEXT, found.model_context)
    notices = list(found.notices)
    if context < longest and not options.max_model_len:
        notices.append(f"requests may have {context:,} tokens; memory allows --max-model-len {longest}")
    elif context < min(CONTEXT, found.model_context) and not options.max_model_len:
        notices.append(f"requests may have {context:,} tokens, all that memory allows")
    if devices:
        return Place(devices[: found.tensor_parallel], context, None, tuple(notices))

    # 4) On a CPU, the KV cache: vLLM must be told its size.
    requests = max(1, min(CPU_REQUESTS, int(found.max_concurrency / CPU_BLOCKS)))
    return Place((), context, int(fitted(context, requests).kv * CPU_BLOCKS), tuple(notices))


def place_embedded(checkpoint: str, headers: Checkpoint, devices: Sequence[Gpu], options: Options) -> int:
    """Return the longest request, in tokens, that the embedded engine can hold in RAM; GPUs are not counted.

    With `devices` nothing is checked, because the engine may spread to them. Raises `UsageError` for a context longer
    than the model's, `DoesNotFitError` where it does not fit.
    """
    model_context = Model.read(headers).max_context
    _check_length(options, model_context)
    context = options.max_model_len or min(CONTEXT, model_context)
    available = machine.available_memory()
    while not devices and (needed := ram_needed(headers, context, dtype=options.dtype)) > available:
        if options.max_model_len or context <= MIN_CONTEXT:
            raise DoesNotFitError(
                f"{checkpoint} for {context:,} tokens needs {gigabytes(needed)} of RAM, and "
                f"{gigabytes(available)} are available; end other programs, or take a smaller model"
            )
        context //= 2
    return context


def _check_length(options: Options, model_context: int) -> None:
    if options.max_model_len and options.max_model_len > model_context:
        raise UsageError(f"--max-model-len {options.max_model_len}: the model's longest context is {model_context}")
