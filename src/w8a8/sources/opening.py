"""`view`: a checkpoint as logical tensors, whatever it is stored as.

Each spelling is a module with a function `find`, which claims the tensors that it knows by names, dtypes and shapes,
and says as what logical tensors they are seen. What none of them claims is dense.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.checkpoint.stream import tensor_bytes
from w8a8.errors import AlreadyQuantizedError, SourceError, W8A8Error
from w8a8.formats.detect import declared, detect, section, undeclared
from w8a8.formats.foreign import quantized_as
from w8a8.sources import fp4, gptq, nf4, packed, scaled
from w8a8.sources.beside import REPAIR
from w8a8.sources.complete import check
from w8a8.sources.experts import Stack, split, stacked
from w8a8.sources.view import LogicalTensor, View, ViewShard, plain

Find = Callable[[Mapping[str, TensorSpec], Mapping[str, Any]], Iterator[LogicalTensor]]

SPELLINGS: tuple[Find, ...] = (scaled.find, fp4.find, packed.find, gptq.find)
"""`find(tensors, declared)` of every spelling; `declared` is the `quantization_config`, or empty.

bitsandbytes' NF4 is not among them: it keeps its shapes in tensors, so its `find` reads these.
"""


def view(checkpoint: Checkpoint, stacks: Sequence[Stack] = ()) -> View:
    """See `checkpoint` as logical tensors, and its `stacks` as experts; a GGUF file has its own names for these.

    Raises `AlreadyQuantizedError` where it is quantized in a way that cannot be read, and what the spellings raise
    where something does not fit.
    """
    if checkpoint.gguf:
        from w8a8.sources import gguf  # which loads Numba

        return gguf.view(checkpoint, checkpoint.gguf)
    # 1) What each spelling knows
    tensors = dict(checkpoint.tensors)
    found: dict[str, LogicalTensor] = {}
    labels = set()
    bitsandbytes: Find = lambda known, _: nf4.find(known, partial(tensor_bytes, checkpoint.path))  # noqa: E731
    for find in (*SPELLINGS, bitsandbytes):
        for tensor in find(dict(tensors), declared(checkpoint.config) or {}):
            found[tensor.stored.name] = tensor
            labels.add(tensor.decoder.label)
            for spec in (tensor.stored, *tensor.beside):
                tensors.pop(spec.name, None)
    seen = quantized_as(tensors.values())
    if seen and found:
        raise SourceError(f"{checkpoint.path}: {seen}, and what it is read with is missing; {REPAIR}")
    if seen or (declared(checkpoint.config) is not None and not found):
        method = detect(checkpoint.config).method
        said = ", ".join(filter(None, ("" if method == "none" else f"quant_method {method}", seen)))
        raise AlreadyQuantizedError(f"{checkpoint.path}: already quantized ({said}); quantize the BF16 original")
    # 2) What is dense; and the experts
    found |= {name: plain(spec) for name, spec in tensors.items()}
    whole: dict[str, LogicalTensor] = {}
    shards = []
    sizes = {**checkpoint.config, **section(checkpoint.config, "text_config")}
    for shard in checkpoint.shards:
        own: list[LogicalTensor] = []
        for tensor, experts in split((found[t.name] for t in shard.tensors if t.name in found), stacks, sizes):
            own += experts or (tensor,)
            whole |= {expert.name: tensor for expert in experts}
        shards.append(ViewShard(shard, tuple(own)))
    check((tensor for shard in shards for tensor in shard.tensors), checkpoint.config, str(checkpoint.path))
    return View(checkpoint, undeclared(checkpoint.config), tuple(shards), ", ".join(sorted(labels)), whole)


def as_stored(checkpoint: Checkpoint) -> View:
    """See every tensor of `checkpoint` as it is stored, whatever it means."""
    shards = tuple(ViewShard(shard, tuple(map(plain, shard.tensors))) for shard in checkpoint.shards)
    return View(checkpoint, checkpoint.config, shards)


def as_run(checkpoint: Checkpoint) -> View:
    """See what a model computes with: W8A8 as it is stored, any other quantization decoded, stacks of experts whole.

    Raises what `view` raises.
    """
    return as_stored(checkpoint) if detect(checkpoint.config).w8a8 else view(checkpoint)


def owners(checkpoint: Checkpoint) -> tuple[str, Mapping[str, LogicalTensor]]:
    """How a checkpoint is quantized, "" where it is not; and the logical tensor of every stored one, by its name.

    That is the tensor itself where `view` does not see how it is to be read, and of a GGUF file, which is counted as
    the dense model that it becomes.
    """
    stored = {spec.name: plain(spec) for spec in checkpoint.tensors.values()}
    if checkpoint.gguf:
        return checkpoint.gguf.label, stored
    try:
        seen = view(checkpoint)
    except W8A8Error:
        return "", stored
    parts = {spec.name: tensor for tensor in seen.tensors.values() for spec in (tensor.stored, *tensor.beside)}
    return seen.quantized, stored | parts


def unsplit(seen: View) -> View:
    """The view with every stack as one tensor, not as experts."""
    return with_stacks(seen, {stack.name for stack in seen.stacks.values()})


def with_stacks(seen: View, names: Collection[str]) -> View:
    """The view with the stacks called `names` as one tensor each, not as experts."""
    chosen = {expert: stack for expert, stack in seen.stacks.items() if stack.name in names}
    if not chosen:
        return seen
    shards = (replace(shard, tensors=tuple(stacked(shard.tensors, chosen))) for shard in seen.shards)
    rest = {expert: stack for expert, stack in seen.stacks.items() if expert not in chosen}
    return replace(seen, shards=tuple(shards), stacks=rest)
