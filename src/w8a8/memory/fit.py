"""`w8a8 fit`: will this checkpoint run on these GPUs, how far would they reach, and what to change if not.

vLLM takes `utilization` of a GPU's memory: the budget. Weights, rotary tables, the largest activations and the engine
itself come out of it; the rest is KV cache, and must hold `concurrency` requests of `context` tokens each at the same
time. All GPUs hold the same, so the smallest decides.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from w8a8.checkpoint import Checkpoint, Shard, TensorSpec
from w8a8.checkpoint.finding import open_headers
from w8a8.errors import NoDeviceError, UsageError, W8A8Error
from w8a8.formats import detect
from w8a8.formats.detect import section
from w8a8.machine import MAX_GPUS, Gpu, gigabytes
from w8a8.memory.kv import KvCache, kv_cache
from w8a8.memory.model import Model
from w8a8.memory.weights import weights_per_gpu
from w8a8.memory.working import activation_bytes, engine_bytes, largest_batch, rotary_bytes
from w8a8.plan import make_plan
from w8a8.plan.viewing import format_for, view_of

DEFAULT_CONTEXT = 8192
DEFAULT_UTILIZATION = 0.9
KV_DTYPES = {"auto": 2, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of an element of the KV cache, by its name in vLLM's `--kv-cache-dtype`."""

CARDS_GIB = (8, 12, 16, 20, 24, 32, 48, 64, 80, 96, 141, 192, 288)
"""Memory sizes of cards on sale."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The memory that one of `tensor_parallel` GPUs needs, in bytes, and how far it reaches.

    `weights`, `rotary` and `kv` are counted, `activations` and `engine` estimated. `max_context` is the longest context
    for `concurrency` requests (0: none), `max_concurrency` the number of requests of `context` tokens.
    `kv_per_token`: bytes of a token on one GPU while it is in every layer's window, `kv_beyond_window`: after that;
    `state_per_sequence`: bytes of states that layers keep of a sequence of any length (state-space layers, linear
    attention, short convolutions), one copy.
    """

    name: str
    scheme: str
    gpus: tuple[Gpu, ...]
    tensor_parallel: int
    context: int
    concurrency: int
    kv_dtype: str
    utilization: float
    text_only: bool
    memory: int
    weights: int
    rotary: int
    activations: int
    engine: int
    kv: int
    kv_per_token: int
    kv_beyond_window: int
    state_per_sequence: int
    max_context: int
    max_concurrency: int
    model_context: int
    advice: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def budget(self) -> int:
        """Bytes of a GPU's memory that the engine may take."""
        return int(self.memory * self.utilization)

    @property
    def needed(self) -> int:
        """Bytes of a GPU's memory that the engine needs."""
        return self.weights + self.rotary + self.activations + self.engine + self.kv

    @property
    def fits(self) -> bool:
        """Whether the engine needs no more than it may take."""
        return self.needed <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"fits": self.fits, "needed": self.needed, "budget": self.budget, **asdict(self)}


def fit(
    checkpoint: str | Path | Checkpoint,
    gpus: Sequence[Gpu],
    *,
    context: int = DEFAULT_CONTEXT,
    concurrency: int = 1,
    kv_dtype: str = "auto",
    utilization: float = DEFAULT_UTILIZATION,
    text_only: bool = False,
) -> Fit:
    """Say whether `checkpoint` (a folder, a Hub id, or an opened one) runs on `gpus`, from its headers alone.

    `context` is cut to the model's maximum. Tensor parallelism must divide the model's heads: the largest number of
    GPUs that does is used. Raises `NoDeviceError` without GPUs, `UsageError` for an impossible request, and the errors
    of opening a checkpoint.
    """
    # 1) Read the model.
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_headers(checkpoint)
    _check(gpus, context, concurrency, kv_dtype, utilization)
    model = Model.read(opened)
    # 2) Choose how to run it: on as many GPUs as can share it.
    case = _Case(
        model,
        tuple(gpus),
        tensor_parallel=next(n for n in range(len(gpus), 0, -1) if _can_split(model, n, text_only=text_only)),
        context=min(context, model.max_context),
        concurrency=concurrency,
        kv_dtype=kv_dtype,
        utilization=utilization,
        text_only=text_only,
    )
    # 3) Count, then say what to know and what to change.
    found = case.measure()
    notices = tuple(_notices(case, context))
    return replace(found, notices=notices, advice=() if found.fits else tuple(_advice(case, found)))


def _check(gpus: Sequence[Gpu], context: int, concurrency: int, kv_dtype: str, utilization: float) -> None:
    if not gpus:
        raise NoDeviceError("no GPU found on this machine, and none described; describe one, e.g. --gpu 24GiB")
    if context < 1 or concurrency < 1:
        raise UsageError("context and concurrency must be 1 or more")
    if kv_dtype not in KV_DTYPES:
        raise UsageError(f"unknown KV dtype {kv_dtype!r}; choose one of {', '.join(KV_DTYPES)}")
    if not 0 < utilization <= 1:
        raise UsageError(f"the share of GPU memory to use must be above 0 and at most 1, not {utilization}")


@dataclass(frozen=True)
class _Case:
    """One way to run one model; `dataclasses.replace` makes variants to try."""

    model: Model
    gpus: tuple[Gpu, ...]
    tensor_parallel: int
    context: int
    concurrency: int
    kv_dtype: str
    utilization: float
    text_only: bool

    @property
    def gpu(self) -> Gpu:
        return min(self.gpus, key=lambda gpu: gpu.memory)

    @property
    def cache(self) -> KvCache:
        return kv_cache(self.model.layers, self.tensor_parallel, KV_DTYPES[self.kv_dtype])

    def measure(self) -> Fit:
        """Count what one GPU needs, and how far that reaches."""
        # 1) What does not depend on the context.
        model, cache = self.model, self.cache
        weights = weights_per_gpu(model, self.tensor_parallel, text_only=self.text_only)
        rotary, engine = rotary_bytes(model), engine_bytes(self.tensor_parallel)
        room = int(self.gpu.memory * self.utilization) - weights - rotary - engine

        # 2) What does: the largest batch, and with it activations and cache.
        def working(context: int) -> tuple[int, int]:
            """The tokens of the largest batch at a context, and the bytes of its activations."""
            batch = largest_batch(model, self.gpu, context, text_only=self.text_only)
            return batch.tokens, activation_bytes(model, self.tensor_parallel, batch, text_only=self.text_only)

        def holds(context: int) -> bool:
            tokens, activations = working(context)
            return cache.nbytes(context, self.concurrency, tokens) <= room - activations

        # 3) The case as asked, and its limits.
        tokens, activations = working(self.context)
        blocks = cache.blocks(self.context, tokens)
        return Fit(
            name=model.checkpoint.name,
            scheme=_scheme(model),
            gpus=self.gpus,
            tensor_parallel=self.tensor_parallel,
            context=self.context,
            concurrency=self.concurrency,
            kv_dtype=self.kv_dtype,
            utilization=self.utilization,
            text_only=self.text_only,
            memory=self.gpu.memory,
            weights=weights,
            rotary=rotary,
            activations=activations,
            engine=engine,
            kv=cache.nbytes(self.context, self.concurrency, tokens),
            kv_per_token=cache.per_token,
            kv_beyond_window=cache.beyond_window,
            state_per_sequence=cache.per_sequence,
            max_context=_largest(holds, model.max_context),
            max_concurrency=max(0, (room - activations) // cache.block_bytes - 1) // blocks if blocks else 0,
            model_context=model.max_context,
        )


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which `holds`, which then holds for all smaller ones; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _can_split(model: Model, gpus: int, *, text_only: bool) -> bool:
    """Whether `gpus` divide all that vLLM asserts they do: heads, KV heads, MLP, split towers."""
    kv = {layer.heads for layer in model.layers if layer.heads and layer.kind != "latent"}
    even = [model.heads, model.intermediate]
    if model.table.split_towers and model.vision and not text_only:
        vision = section(model.checkpoint.config, "vision_config")
        heads = vision.get("num_attention_heads", vision.get("num_heads"))
        even += [heads] if type(heads) is int and heads > 0 else []
    even += [model.experts.width] if model.experts else []
    states = all(layer.state.splits(gpus) for layer in model.layers if layer.state)
    return all(n % gpus == 0 for n in even) and all(n % gpus == 0 or gpus % n == 0 for n in kv) and states


def _notices(case: _Case, asked: int) -> Iterator[str]:
    model, gpus = case.model, case.gpus
    if case.tensor_parallel < len(gpus):
        yield (
            f"only {case.tensor_parallel} of {len(gpus)} GPUs can be used: tensor parallelism must divide "
            f"{model.heads} attention heads, the KV heads, the MLP, experts and states"
        )
    if asked > model.max_context:
        yield f"the model's longest context is {model.max_context:,} tokens"
    if len({gpu.memory for gpu in gpus}) > 1:
        yield "the GPUs differ; each holds only as much as the smallest can"
    if not model.rules.known:
        yield f"no rules for {model.rules.architecture}: its tensors are split by what their names usually mean"
    scheme = detect(model.checkpoint.config)
    if model.quantized:
        counted = "counted dequantized" if model.checkpoint.gguf else "counted as it is stored"
        yield f"quantized already ({model.quantized}): {counted}"
    elif scheme.method != "none" and not scheme.w8a8:
        yield f"quantized otherwise ({scheme.summary}): sizes are as in the file"
    yield from (f"not counted: {what}" for what in model.uncounted)


def _advice(case: _Case, now: Fit) -> Iterator[str]:
    """Changes that make it fit, the cheapest first, each one tried; `now` is what the unchanged case needs."""
    if now.max_context:
        yield f"a context of {now.max_context:,} tokens (--context {now.max_context})"
    if now.max_concurrency:
        requests = "one request" if now.max_concurrency == 1 else f"{now.max_concurrency} requests"
        yield f"{requests} of {case.context:,} tokens at once (--concurrency {now.max_concurrency})"
    if (quantized := _quantized(case)) and (smaller := quantized.measure()).fits:
        yield f"quantizing it (`w8a8 quantize`): {gigabytes(smaller.weights)} of weights on each GPU"
    for count in (2**power for power in range(1, MAX_GPUS.bit_length())):
        if count > case.tensor_parallel and _can_split(case.model, count, text_only=case.text_only):
            more = replace(case, tensor_parallel=count, gpus=(case.gpu,) * count).measure()
            if more.fits:
                yield f"{count} such GPUs (--count {count}): {gigabytes(more.needed)} on each"
                break
    if KV_DTYPES[case.kv_dtype] > 1:
        yield from _variant(replace(case, kv_dtype="fp8"), "an 8-bit KV cache (--kv-dtype fp8)")
    if case.model.vision and not case.text_only:
        yield from _variant(replace(case, text_only=True), "text alone (--text-only, no vision tower)")
    for card in CARDS_GIB:
        larger = replace(case, gpus=tuple(replace(case.gpu, memory=card * 2**30) for _ in case.gpus))
        if card * 2**30 > case.gpu.memory and larger.measure().fits:
            yield f"{'a card' if len(case.gpus) == 1 else f'{len(case.gpus)} cards'} of {card} GiB"
            break


def _variant(case: _Case, what: str) -> Iterator[str]:
    """Advise `what` if the case made of it fits, or would with a shorter context."""
    found = case.measure()
    if found.fits:
        yield what
    elif found.max_context:
        yield f"{what}, with a context of {found.max_context:,} tokens"


def _quantized(case: _Case) -> _Case | None:
    """The case with the checkpoint that `w8a8 quantize` would write; None if the source cannot be quantized."""
    source = case.model.checkpoint
    try:
        seen = view_of(source)
        plan = make_plan(seen, format_for(seen), source=source.path.name)
    except W8A8Error:
        return None
    tensors = tuple(
        TensorSpec(w.name, w.dtype, w.shape, shard.name, w.begin, w.nbytes)
        for shard in plan.shards
        for w in shard.writes
    )
    result = replace(source, config=plan.config, shards=(Shard("", plan.bytes_out, tensors),), gguf=None)
    return replace(case, model=Model.read(result))


def _scheme(model: Model) -> str:
    """The scheme in a few words: its summary up to the colon."""
    return model.quantized or detect(model.checkpoint.config).summary.partition(":")[0]
