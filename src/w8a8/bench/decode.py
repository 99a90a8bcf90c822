"""`w8a8 bench decode`: prefill and decode with Gemma 4 31B's layers in transformers, W8A8 against BF16, random weights.

The model has as many layers as fit into memory twice, and a vocabulary cut to the same share, so that the head, BF16 in
both, costs its share of the whole model. The two models, twins in one process, share everything but their linear
layers, take turns token by token, and get the same tokens.

6 layers on two cores of a Zen 5: decode 10.3 tokens/s against 3.1 in BF16 (3.35 times), prefill of 512 tokens 168
against 102 (1.64 times).
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from w8a8.bench.model import GEMMA_4_31B, HIDDEN, LAYER_BYTES, LAYERS, VOCABULARY, make_model
from w8a8.errors import DoesNotFitError, MissingExtraError
from w8a8.machine import available_memory
from w8a8.terminal.output import plain_table

MEMORY_SHARE = 0.8
"""The share of the available memory that the weights may take."""


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Seconds of every decoded token and of every prefill, for both twins."""

    layers: int
    prompt: int
    threads: int
    w8a8_decode: tuple[float, ...]
    bf16_decode: tuple[float, ...]
    w8a8_prefill: tuple[float, ...]
    bf16_prefill: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all times, and the medians as tokens per second, as plain JSON values."""
        decode = [1 / statistics.median(all_) for all_ in (self.w8a8_decode, self.bf16_decode)]
        prefill = [self.prompt / statistics.median(all_) for all_ in (self.w8a8_prefill, self.bf16_prefill)]
        return {
            **asdict(self),
            "decode_tokens_per_second": {"w8a8": decode[0], "bf16": decode[1], "speedup": decode[0] / decode[1]},
            "prefill_tokens_per_second": {"w8a8": prefill[0], "bf16": prefill[1], "speedup": prefill[0] / prefill[1]},
        }


def bench(
    *,
    layers: int | None = None,
    tokens: int = 32,
    prompt: int = 512,
    runs: int = 5,
    shapes: dict[str, Any] = GEMMA_4_31B,
    notice: Callable[[str], None] = lambda _: None,
) -> DecodeResult:
    """Build the twins of `layers` layers, prefill `prompt` tokens `runs` times, then decode `tokens` tokens.

    Raises MissingExtraError without torch and transformers, DoesNotFitError where not even one layer fits.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("bench decode needs torch and transformers: pip install 'w8a8[serve]'") from error
    # 1) The twins.
    layers = layers or fitting_layers(available_memory())
    notice(f"making {layers} of {LAYERS} layers, in BF16 and in W8A8")
    with torch.inference_mode():
        bf16 = make_model(layers, shapes)
        twins = (make_twin(bf16), bf16)
        vocabulary = bf16.config.vocab_size
        ids = torch.randint(0, vocabulary, (1, prompt + tokens + 1), generator=torch.Generator().manual_seed(0))
        # 2) Prefill, by turns.
        prefill: list[list[float]] = [[], []]
        for run in range(-1, runs):
            caches = [
                _timed(twin, ids[:, :prompt], None, seconds) for twin, seconds in zip(twins, prefill, strict=True)
            ]
            if run >= 0:
                notice(f"prefill {run + 1}/{runs}: {prefill[0][-1]:.2f} s, BF16 {prefill[1][-1]:.2f} s")
        # 3) Decode, by turns, from the last prefill's caches.
        decode: list[list[float]] = [[], []]
        for at in range(prompt, prompt + tokens + 1):
            for twin, cache, seconds in zip(twins, caches, decode, strict=True):
                _timed(twin, ids[:, at : at + 1], cache, seconds)
    counted = [tuple(all_[1:]) for all_ in (*decode, *prefill)]  # the first of each warms up
    return DecodeResult(layers, prompt, torch.get_num_threads(), *counted)


def show(result: DecodeResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    table = plain_table("", "W8A8 tokens/s", "BF16 tokens/s", "speedup", left=1)
    values = result.to_dict()
    for name, row in (
        ("decode", "decode_tokens_per_second"),
        (f"prefill of {result.prompt}", "prefill_tokens_per_second"),
    ):
        found = values[row]
        table.add_row(name, f"{found['w8a8']:.2f}", f"{found['bf16']:.2f}", f"{found['speedup']:.2f}")
    say(
        f"{result.layers} of {LAYERS} layers of Gemma 4 31B, {result.threads} threads; medians of "
        f"{len(result.w8a8_decode)} tokens and {len(result.w8a8_prefill)} prefills"
    )
    say(table)


def fitting_layers(memory: int) -> int:
    """Return how many layers fit into `memory` bytes, in BF16 and INT8, with their share of the head.

    Raises DoesNotFitError where not even one fits.
    """
    head = 2 * HIDDEN * VOCABULARY / LAYERS
    layers = int(memory * MEMORY_SHARE // (1.5 * LAYER_BYTES + head))
    if layers < 1:
        raise DoesNotFitError(f"one layer of Gemma 4 31B takes 1.5 GB in BF16 and INT8; {memory / 1e9:.1f} GB are free")
    return min(LAYERS, layers // 6 * 6 or layers)


def make_twin(model: Any) -> Any:
    """Copy `model`: the copy shares everything but the decoder's linear layers, which are quantized."""
    from torch import nn

    shared = {id(part): part for part in model.parameters()}
    quantized = {id(m): _quantized(m) for m in model.model.layers.modules() if isinstance(m, nn.Linear)}
    return copy.deepcopy(model, {**shared, **quantized})


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
