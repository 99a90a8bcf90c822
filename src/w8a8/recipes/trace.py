"""Find the groups of a decoder layer by running it, and prove by running it what can be folded where.

This is for architectures whose table has no groups. A layer with random weights reads random states. Linear layers that
read the same values are a group; other modules with a matrix that do so are its readers. What may make the values is
tried: a norm whose output they are, or a linear layer before them that is wide enough. It does where two things hold:
dividing its channels changes what leaves the layer, and multiplying the columns of all that read them undoes that. The
first layers of experts read what the module of all experts reads; within each, the last reads what the others make.

Scales are powers of two, by which floating-point numbers are divided and multiplied without rounding, and the gains of
norms have few bits. So a fold that is exact changes nothing at all, and one that is not cannot hide in rounding.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.recipes.folding import by_row, channels_of, divide, expand, heads_of, multiply, shared_copy
from w8a8.recipes.groups import Group
from w8a8.runtime.calls import Call, States
from w8a8.runtime.experts import LAYER, Experts, holds_experts
from w8a8.runtime.linear import frozen
from w8a8.runtime.streamed import passed
from w8a8.runtime.unread import Unread

NOTHING, SOMETHING = 1e-6, 1e-4
"""How much of the largest value that leaves a layer may change at most, or has to change at least."""
NOISE, STEP = 1_000_003, 7919
"""Number of random values that matrices repeat, and how much further on each begins; primes, so that no rows of them
hold the same."""
OCTAVES = 3
"""Scales are from a half to the power of this to two to its power."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def trace(layer: nn.Module, call: Call, consumers: Collection[str]) -> tuple[Group, ...]:
    """Find the groups of `layer` by what it does when it is called so, in order.

    `consumers` are the paths of the linear layers that are quantized. All is float32 and random. A linear layer that
    does not read one vector per token, once, is in no group.
    """
    seen = _Seen.of(layer, call)
    return tuple(_groups(seen, consumers))


def random_copy(layer: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a layer with random float32 weights; its buffers stay as they are.

    Weights of one width lie over each other in memory, each a little further on: so all experts take the memory of one.
    """
    made = deepcopy(layer)
    made.__dict__.pop("forward", None)  # that of a hollow layer
    noise = _Noise(device)
    for path, module in [*made.named_modules()]:
        if isinstance(module, Unread):
            made.set_submodule(path, nn.Linear(module.in_features, module.out_features, bias=False, device="meta"))
    for module in made.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, frozen(noise.like(value, stacked=holds_experts(module))))
    return made.float().eval()


class _Noise:
    """Random weights: of a matrix normal ones; of a vector (gains, biases) such around 1 as have few bits."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._generator = device, torch.Generator().manual_seed(0)
        self._noise = torch.randn(NOISE, generator=self._generator)
        self._lines: dict[int, Tensor] = {}
        self._drawn = 0

    def like(self, value: Tensor, *, stacked: bool) -> Tensor:
        """Random values in the shape of `value`, which may be a stack of matrices."""
        if value.dim() < 2 or (stacked and value.dim() < 3):
            return (torch.randint(32, 97, value.shape, generator=self._generator) / 64).to(self._device)
        one = torch.empty(value.shape[1:] if stacked else value.shape, device="meta")
        count, columns = len(value) if stacked else 1, one.shape[-1]
        line = self._lines.get(columns)
        length = one.numel() + (count + 1) * STEP + NOISE
        if line is None or len(line) < length:
            line = self._noise.repeat(-(-length // NOISE))[:length].to(self._device) * columns**-0.5
            self._lines[columns] = line
        start, self._drawn = self._drawn * STEP % NOISE, self._drawn + count
        strides = (STEP, *one.stride()) if stacked else one.stride()
        return line.as_strided(value.shape, strides, start)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A run of a layer: what its modules with a matrix have `read` [tokens, in], in the order they ran, and what those
    with a vector have `made` [tokens, out]; and the tensors that have left it."""

    layer: nn.Module
    call: Call
    read: Mapping[str, Sequence[Tensor]]
    made: Mapping[str, Tensor]
    left: Sequence[Tensor]

    @classmethod
    def of(cls, layer: nn.Module, call: Call) -> "_Seen":
        """Run the layer."""
        read: dict[str, list[Tensor]] = {}
        made: dict[str, Tensor] = {}

        def before(path: str, width: int, arguments: tuple[Any, ...]) -> None:
            if arguments and _is_wide(arguments[0], width):
                read.setdefault(path, []).append(arguments[0].reshape(-1, width).clone())

        def after(path: str, width: int, output: Any) -> None:
            if _is_wide(output, width):
                made[path] = output.reshape(-1, width).clone()

        with ExitStack() as stack:
            for path, module in layer.named_modules():
                shape: Sequence[int] = getattr(getattr(module, "weight", None), "shape", ())
                if isinstance(module, Experts):
                    shape = (0, module.down_proj[0].out_features)
                if len(shape) == 2:
                    hook = module.register_forward_pre_hook(lambda _m, a, p=path, w=shape[1]: before(p, w, a))
                    stack.callback(hook.remove)
                elif len(shape) == 1:
                    hook = module.register_forward_hook(lambda _m, _a, out, p=path, w=shape[0]: after(p, w, out))
                    stack.callback(hook.remove)
            left = _run(layer, call)
        return cls(layer, call, read, made, left)

    def changed(self, layer: nn.Module) -> float:
        """How far off is what leaves a changed copy of the layer, as a share of the largest value; NaN if that is."""
        pairs = zip(_run(layer, self.call), self.left, strict=True)
        return float(torch.stack([(now - then).abs().max() / then.abs().max() for now, then in pairs]).max())


def _is_wide(value: Any, width: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and value.shape[-1] == width


def _run(layer: nn.Module, call: Call) -> list[Tensor]:
    """Run a layer; return the states and all else that leaves it."""
    leaving = passed(layer, Call(States(call.states.hidden.clone(), call.states.left), call.kwargs))
    return [leaving.hidden, *(each for each in leaving.left.values() if each.is_floating_point())]


# --- groups ---------------------------------------------------------------------------------------------------------


def _groups(seen: _Seen, consumers: Collection[str]) -> Iterator[Group]:
    """The groups: those of `consumers` that read the same values, and what makes these."""
    tokens = seen.call.states.hidden.shape[-2]
    once = {path: values[0] for path, values in seen.read.items() if len(values) == 1 and len(values[0]) == tokens}
    while once:
        values = next(iter(once.values()))
        alike = [path for path, other in once.items() if _equal(other, values)]
        for path in alike:
            del once[path]
        linear = [each for path in alike for each in _first_layers(seen.layer.get_submodule(path), path)]
        ours = tuple(path for path in linear if path in consumers)
        if ours:
            group = Group(_name(ours), ours, readers=tuple(path for path in linear if path not in consumers))
            yield _with_producer(seen, group, alike[0], values)
        for path in alike:
            module = seen.layer.get_submodule(path)
            if isinstance(module, Experts):
                yield from _last_layers(seen, module, path, consumers)


def _first_layers(module: nn.Module, path: str) -> Iterator[str]:
    """The linear layers that read what a module reads: of experts, the first ones of each."""
    if not isinstance(module, Experts):
        yield path
        return
    for name in ("gate_proj", "up_proj", "gate_up_proj"):
        yield from (f"{path}.{name}.{number}" for number in range(len(getattr(module, name, ()))))


def _last_layers(seen: _Seen, experts: Experts, path: str, consumers: Collection[str]) -> list[Group]:
    """A group for each expert's last layer, with what makes its inputs, if that holds for all of them."""
    numbers = [n for n in range(len(experts.down_proj)) if f"{path}.down_proj.{n}" in consumers]
    groups = [Group("down", (f"{path}.down_proj.{number}",)) for number in numbers]
    part = "gate_up_proj" if experts.joined else "up_proj"
    width = experts.down_proj[0].in_features
    for start in dict.fromkeys((getattr(experts, part)[0].out_features - width, 0)):
        tried = [
            replace(group, producer=f"{path}.{part}.{number}", kind="linear", start=start)
            for number, group in zip(numbers, groups, strict=True)
        ]
        if _holds(seen, tried):
            return tried
    return groups


def _name(paths: Sequence[str]) -> str:
    """A name for a group: `q/k/v` for paths that end in q_proj, k_proj and v_proj."""
    leaves = (re.sub(r"\.\d+$", "", path).rpartition(".")[2] for path in paths)
    return "/".join(dict.fromkeys(leaf.removesuffix("_proj") for leaf in leaves))


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one, other))


# --- what makes their values ----------------------------------------------------------------------------------------


def _with_producer(seen: _Seen, group: Group, first: str, values: Tensor) -> Group:
    """The group with the first producer that holds, or without one; `first` is what reads the `values` first."""
    return next((each for each in _candidates(seen, group, first, values) if _holds(seen, [each])), group)


def _candidates(seen: _Seen, group: Group, first: str, values: Tensor) -> Iterator[Group]:
    """The group with all that may make its values: the norms whose output they are, then linear layers before it."""
    for path in [path for path, output in seen.made.items() if _equal(output, values)]:
        for offset in (0.0, 1.0):
            yield replace(group, producer=path, kind="norm", offset=offset)
    order = [*seen.read]
    for path in reversed(order[: order.index(first)]):
        linear = seen.layer.get_submodule(path)
        if isinstance(linear, nn.Linear) and path not in group.consumers:
            yield from _by_rows(group, path, linear.out_features, values.shape[1])
            yield from _by_heads(seen.layer, group, path, values.shape[1])


def _by_rows(group: Group, path: str, rows: int, width: int) -> Iterator[Group]:
    """The group with the last or first rows of a linear layer, one for each channel."""
    if rows >= width:
        for start in dict.fromkeys((rows - width, 0)):
            yield replace(group, producer=path, kind="linear", start=start)


def _by_heads(layer: nn.Module, group: Group, path: str, width: int) -> Iterator[Group]:
    """The group with the rows of a linear layer that make values: all, or the last, as many as those of keys."""
    parent = path.rpartition(".")[0]
    size = getattr(layer.get_submodule(parent), "head_dim", None)
    if parent != group.consumers[0].rpartition(".")[0] or not isinstance(size, int) or width % size:
        return
    rows = layer.get_submodule(path).out_features
    channels = rows if rows < width else (rows - width) // 2
    if channels > 0 and channels % size == 0 and width % channels == 0:
        yield replace(group, producer=path, kind="value", start=rows - channels)


def _holds(seen: _Seen, groups: Sequence[Group]) -> bool:
    """Whether dividing the producers' channels changes what leaves the layer, and multiplying columns undoes it."""
    generator = torch.Generator().manual_seed(1)
    divided, folded = shared_copy(seen.layer), shared_copy(seen.layer)
    for group in groups:
        exponents = torch.randint(-OCTAVES, OCTAVES + 1, (channels_of(folded, group),), generator=generator)
        scales = (2.0**exponents).to(seen.call.states.hidden.device)
        for layer in (divided, folded):
            _divide(layer, group, scales)
        _multiply(folded, [*group.consumers, *group.readers], expand(scales, heads_of(folded, group)))
    return bool(groups) and seen.changed(folded) <= NOTHING and seen.changed(divided) >= SOMETHING


def _divide(layer: nn.Module, group: Group, scales: Tensor) -> None:
    """Divide the channels of a group's producer; of an expert's layer what it gives, for all experts share memory."""
    assert group.producer is not None
    if not LAYER.fullmatch(group.producer):
        divide(layer, group, scales, torch.float32)
        return

    def after(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output / by_row(scales, output.shape[-1], group.start)

    layer.get_submodule(group.producer).register_forward_hook(after)


def _multiply(layer: nn.Module, paths: Sequence[str], by_channel: Tensor) -> None:
    """Multiply the columns of modules' weights; of an expert's layer what it reads."""

    def before(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0] * by_channel, *arguments[1:])

    for path in paths:
        if LAYER.fullmatch(path):
            layer.get_submodule(path).register_forward_pre_hook(before)
        else:
            multiply(layer, [path], by_channel, torch.float32)
