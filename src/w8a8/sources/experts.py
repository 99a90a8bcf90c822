"""Tensors that hold all experts of a layer, seen as one matrix per expert and projection.

Engines load `experts.3.gate_proj.weight` [I, H] where transformers stores `experts.gate_up_proj` [E, 2I, H], or its
transpose [E, H, 2I]. Which tensors those are is data of the architecture (`plan/architectures.toml`, `stacks`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stack:
    """How an architecture stores a layer's experts.

    `tensor` is the end of the stored tensor's name, `parts` are the modules or tensors that it becomes, in the order of
    its rows, `{}` being the expert's number; where a part does not end in `.weight` or `.bias`, `.weight` is meant.
    `transposed`: it holds [E, in, out]. `interleaved`: row i belongs to part i modulo their number.
    """

    tensor: str
    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
