"""Measure in a few seconds what the work of `make demo` costs on this machine: load the model, time a little of it."""

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pace import Machine, Rates

ENOUGH = 0.5
"""Seconds after which a timing counts as representative."""


def import_torch() -> float:
    """Import what runs a model: the seconds it took."""
    begin = time.perf_counter()
    for module in ("transformers.models.gemma3.modeling_gemma3", "w8a8.runtime"):
        import_module(module)
    return time.perf_counter() - begin


def measure(source: Path, imported: float) -> Machine:
    """Measure with the BF16 model in `source`; its imports took `imported` seconds.

    The quantized model is the same with W8A8 layers of the same shapes in place. On the first run on a machine they are
    compiled, which is not counted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="auto").eval()
    start = imported + time.perf_counter() - begin
    with torch.inference_mode():
        logits, bf16 = head_rate(model), rates(model)
        put_int8_layers(model)
        return Machine(start, logits, bf16, rates(model))


def rates(model: Any) -> Rates:
    """Rates of `model`, after calls that are not counted."""
    import torch

    def read(tokens: int) -> Any:
        ids = torch.arange(2, 2 + tokens, device=model.device)[None]
        return model(input_ids=ids, logits_to_keep=1, use_cache=True)

    def decode(steps: int) -> Any:
        for _ in range(steps):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
        return output.logits

    token, cache = torch.full((1, 1), 2, device=model.device), read(16).past_key_values
    decode(1)
    return Rates(seconds_each(lambda n: read(n).logits, (32, 128)), seconds_each(decode, (4, 16)))


def head_rate(model: Any) -> float:
    """Seconds for the logits of a token, and for their softmax."""
    import torch

    weight = model.get_output_embeddings().weight

    def predict(tokens: int) -> Any:
        states = torch.ones(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
        return (states @ weight.T).float().log_softmax(-1)

    predict(1)
    return seconds_each(predict, (16, 64))


def seconds_each(work: Callable[[int], Any], numbers: Sequence[int]) -> float:
    """Seconds for each of `n` in `work(n)`, which returns a tensor: of the first of `numbers` to take `ENOUGH`."""
    for number in numbers:
        begin = time.perf_counter()
        work(number).sum().item()  # waits for a GPU
        seconds = time.perf_counter() - begin
        if seconds >= ENOUGH:
            break
    return seconds / number


def put_int8_layers(model: Any) -> None:
    """Replace the linear layers of `model`, but its head, by W8A8 layers of zeros: they take as long as any."""
    from torch import nn

    from w8a8.runtime import W8A8Linear

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                quantized = W8A8Linear(layer.in_features, layer.out_features, layer.bias is not None)
                setattr(parent, name, quantized.to(layer.weight.device))
