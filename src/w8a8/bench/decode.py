"""`w8a8 bench decode`: prefill and decode with Gemma 4 31B's layers, W8A8 against torch, random weights.

W8A8 is compared with the better of torch's BF16 and float32. The model has as many layers as fit into memory, and a
vocabulary cut to the same share, so that the head, which is never INT8, costs its share of the whole model. The models
take turns in one process, token by token, and get the same tokens. W8A8 and BF16 are twins that share everything but
their linear layers. The layers of the float32 one share a weight for each shape, larger than caches, to fit memory.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from w8a8.bench.model import (
    FULL_KV,
    FULL_Q,
    GEMMA_4_31B,
    HIDDEN,
    INTERMEDIATE,
    KV,
    LAYER_BYTES,
    LAYERS,
    VOCABULARY,
    Q,
    make_model,
)
from w8a8.errors import DoesNotFitError, MissingExtraError
from w8a8.machine import available_memory
from w8a8.terminal.output import plain_table

MEMORY_SHARE = 0.8
"""The share of the available memory that the weights may take."""
FLOAT32_BYTES = 4 * HIDDEN * (2 * INTERMEDIATE + 2 * Q + KV + 2 * FULL_Q + FULL_KV)
"""Bytes of one float32 weight of each shape that the layers have."""


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Seconds of every decoded token and of every prefill, for each model."""

    layers: int
    prompt: int
    threads: int
    w8a8_decode: tuple[float, ...]
    bf16_decode: tuple[float, ...]
    float32_decode: tuple[float, ...]
    w8a8_prefill: tuple[float, ...]
    bf16_prefill: tuple[float, ...]
    float32_prefill: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all times, and the medians as tokens per second, as plain JSON values."""
        return {
            **asdict(self),
            "decode_tokens_per_second": _rates(1, self.w8a8_decode, self.bf16_decode, self.float32_decode),
            "prefill_tokens_per_second": _rates(
                self.prompt, self.w8a8_prefill, self.bf16_prefill, self.float32_prefill
            ),
        }


def _rates(tokens: int, *seconds: Sequence[float]) -> dict[str, float]:
    w8a8, bf16, float32 = (tokens / statistics.median(all_) for all_ in seconds)
    return {"w8a8": w8a8, "bf16": bf16, "float32": float32, "speedup": w8a8 / max(bf16, float32)}


def bench(
    *,
    layers: int | None = None,
    tokens: int = 32,
    prompt: int = 512,
    runs: int = 5,
    shapes: dict[str, Any] = GEMMA_4_31B,
    notice: Callable[[str], None] = lambda _: None,
) -> DecodeResult:
    """Build models of `layers` layers, prefill `prompt` tokens `runs` times, then decode `tokens` tokens.

    Raises MissingExtraError without torch and transformers, DoesNotFitError where not even one layer fits.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("bench decode needs torch and transformers: pip install 'w8a8[serve]'") from error
    from w8a8.runtime.unquantized import widen

    # 1) The models.
    layers = layers or fitting_layers(available_memory())
    notice(f"making {layers} of {LAYERS} layers, in W8A8, BF16 and float32")
    with torch.inference_mode():
        bf16 = make_model(layers, shapes)
        models = (widen(make_twin(bf16)), bf16, make_float32(bf16))
        vocabulary = bf16.config.vocab_size
        ids = torch.randint(0, vocabulary, (1, prompt + tokens + 1), generator=torch.Generator().manual_seed(0))
        # 2) Prefill, by turns.
        prefill: list[list[float]] = [[], [], []]
        for run in range(-1, runs):
            caches = [
                _timed(model, ids[:, :prompt], None, seconds) for model, seconds in zip(models, prefill, strict=True)
            ]
            if run >= 0:
                ours, *others = (f"{all_[-1]:.2f} s" for all_ in prefill)
                notice(f"prefill {run + 1}/{runs}: {ours}, BF16 {others[0]}, float32 {others[1]}")
        # 3) Decode, by turns, from the last prefill's caches.
        decode: list[list[float]] = [[], [], []]
        for at in range(prompt, prompt + tokens + 1):
            for model, cache, seconds in zip(models, caches, decode, strict=True):
                _timed(model, ids[:, at : at + 1], cache, seconds)
    counted = [tuple(all_[1:]) for all_ in (*decode, *prefill)]  # the first of each warms up
    return DecodeResult(layers, prompt, torch.get_num_threads(), *counted)


def show(result: DecodeResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    table = plain_table("", "W8A8 tokens/s", "BF16 tokens/s", "float32 tokens/s", "speedup", left=1)
    values = result.to_dict()
    for name, row in (
        ("decode", "decode_tokens_per_second"),
        (f"prefill of {result.prompt}", "prefill_tokens_per_second"),
    ):
        found = values[row]
        table.add_row(name, *(f"{found[column]:.2f}" for column in ("w8a8", "bf16", "float32", "speedup")))
    say(
        f"{result.layers} of {LAYERS} layers of Gemma 4 31B, {result.threads} threads; medians of "
        f"{len(result.w8a8_decode)} tokens and {len(result.w8a8_prefill)} prefills"
    )
    say(table)


def fitting_layers(memory: int) -> int:
    """Return how many layers fit into `memory` bytes, in BF16 and INT8, with their share of the head, beside float32's.

    Raises DoesNotFitError where not even one fits.
    """
    head = 2 * HIDDEN * VOCABULARY / LAYERS
    layers = int((memory * MEMORY_SHARE - FLOAT32_BYTES) // (1.5 * LAYER_BYTES + 3 * head))
    if layers < 1:
        raise DoesNotFitError(
            f"one layer of Gemma 4 31B takes 5 GB in BF16, INT8 and float32; {memory / 1e9:.1f} GB are free"
        )
    return min(LAYERS, layers // 6 * 6 or layers)


def make_twin(model: Any) -> Any:
    """Copy `model`: the copy shares everything but the decoder's linear layers, which are quantized."""
    from torch import nn

    shared = {id(part): part for part in model.parameters()}
    quantized = {id(m): _quantized(m) for m in model.model.layers.modules() if isinstance(m, nn.Linear)}
    return copy.deepcopy(model, {**shared, **quantized})


def make_float32(model: Any) -> Any:
    """Make a float32 model of the same sizes, in which all parameters of one shape are the same one."""
    from w8a8.runtime.linear import frozen

    shared: dict[Any, Any] = {}
    for part in model.parameters():
        if part.shape not in shared:
            shared[part.shape] = frozen(part.float())
    return copy.deepcopy(model, {id(part): shared[part.shape] for part in model.parameters()}).float()


def _quantized(linear: Any) -> Any:
    """Quantize a linear layer without bias by rounding to nearest: scale amax / 127 per channel."""
    import torch

    from w8a8.runtime.linear import W8A8Linear

    layer = W8A8Linear(linear.in_features, linear.out_features, bias=False, device="meta").to_empty(device="cpu")
    layer.weight_scale.copy_(linear.weight.abs().amax(dim=1).float().clamp_(min=1e-30) / 127)
    for rows in torch.arange(linear.out_features).split(1024):
        codes = linear.weight[rows].float() / layer.weight_scale[rows, None]
        layer.weight[rows] = codes.round_().to(torch.int8)
    return layer


def _timed(model: Any, ids: Any, cache: Any, seconds: list[float]) -> Any:
    """Run `model` on `ids` after `cache`, note how long it took, and return the cache."""
    start = time.perf_counter()
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds.append(time.perf_counter() - start)
    return output.past_key_values
