"""Logits of a whole text, a few positions at a time: with a quarter of a million tokens, all would take gigabytes.

The model's body reads the text once; then the model's own `forward` runs on the body's output, slice by slice. So the
head, and all that an architecture does to its logits (Gemma's soft cap, Cohere's scale), work as they always do.
"""

from collections.abc import Generator
from typing import Any

from torch import Tensor

from w8a8.runtime.streamed import body_of


def sliced_logits(model: Any, rows: int, **inputs: Any) -> Generator[Tensor, None, None]:
    """Yield the logits `[at most rows, vocabulary]` that follow each of `input_ids` [1, tokens], in order.

    `inputs` are those of the model's `forward`; a cache among them is filled once. Exhaust or close the iterator before
    the model is used again: until then its body's `forward` is replaced. Raises what the model raises.
    """
    body = body_of(model)
    read = body.forward
    whole: Any = None

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal whole
        whole = read(*args, **kwargs) if whole is None else whole
        return type(whole)(**{**whole, "last_hidden_state": whole.last_hidden_state[:, now]})

    body.forward = forward
    try:
        for at in range(0, inputs["input_ids"].shape[1], rows):
            now = slice(at, at + rows)
            yield model(**inputs).logits[0]
    finally:
        body.forward = read
