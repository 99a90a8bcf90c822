"""Estimate a calibration before it is run: its time by the first layer of each kind, its memory, its room on the disk.

These layers do what a calibration does with every layer, on the samples that it would read: states pass through them
forwards, gradients backwards (random ones, which take as long), and scales and codes are chosen. A kind's first layer
stands for all of its kind, and one sample at the head for all. All files lie in a temporary folder.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from msgspec import to_builtins

from w8a8.calibrate.activations import Activations
from w8a8.calibrate.costs import (
    VALUES,
    LayerCosts,
    MeasuredCosts,
    at_the_end,
    backwards_through,
    forwards_through,
    probed,
)
from w8a8.calibrate.grouping import kind_of
from w8a8.calibrate.journal import LayerJournal
from w8a8.calibrate.layers import Pass, calibrate_one
from w8a8.calibrate.request import Progress, Request
from w8a8.calibrate.room import Room, room_for
from w8a8.calibrate.setup import Setup
from w8a8.checkpoint.stream import file_sha256
from w8a8.plan import Plan, module_name
from w8a8.runtime.calls import States
from w8a8.sources.view import View


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the work: its seconds as measured once, and how often the calibration does it."""

    name: str
    seconds: float
    times: int

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.seconds * self.times


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a calibration will take; `layers` are those that were run, `of` all of the model.

    `memory` and `gpu_memory` are bytes: the peak of this process while it measured, with `counted` bytes of what it did
    not hold then.
    """

    recipe: str
    samples: int
    tokens: int
    device: str
    layers: tuple[int, ...]
    of: int
    parts: tuple[Part, ...]
    memory: int
    gpu_memory: int
    counted: int
    disk: Room

    @property
    def seconds(self) -> float:
        """Seconds in all, without those of writing the result, which are the same without a recipe."""
        return sum(part.total for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**to_builtins(self), "seconds": self.seconds}


def estimated(
    name: str,
    view: View,
    request: Request,
    make: Callable[..., Plan],
    *,
    progress: Progress,
    notice: Callable[[str], None],
) -> Estimate:
    """Run the first layer of each kind of the model of `view`, and say what a calibration as `request` asks takes.

    `make` makes the plan. `progress(layers)` shows how many of these layers are done. Raises the errors of `Setup.of`,
    DiskFullError, UnwritableError, NonFiniteWeightError.
    """
    with TemporaryDirectory(prefix="w8a8-estimate-") as folder, torch.no_grad():
        # 1) What every calibration begins with
        start, plan = time.perf_counter(), make()
        setup = Setup.of(name, view, plan, request, notice)
        setup = replace(setup, inputs=setup.inputs.stored(setup.model, setup.samples, Path(folder) / "inputs"))
        parts = [Part("open the model, cut the text", time.perf_counter() - start, 1)]
        kinds, passes = _kinds(setup), 2 if request.keep_bf16 else 1
        # 2) A layer of each kind, behind each other as in a model that has no others
        states = Activations(Path(folder) / "states.bin")
        states.write(setup.embedded(range(len(setup.samples))))
        counted = 0
        with progress(len(kinds)) as done:
            for number, like in kinds.items():
                ran = _run(number, setup, plan, states, Path(folder) / f"layer-{number:05}")
                states = ran.leaving
                named = zip(ran.seconds, (1, 1, passes), strict=True)
                parts += [Part(f"{what}, layer {number}", took, times * like) for (what, took), times in named]
                counted += like * sum(cost.token.nbytes + cost.row.nbytes for cost in ran.costs.values())
                done(1)
        # 3) The head, which all samples whose costs are measured pass at once
        numbers = probed(len(setup.samples), setup.tokens)
        parts += _head(setup, states, numbers)
        counted += 3 * len(numbers) * next(setup.embedded([0])).hidden.nbytes
        gpu = setup.model.device.type == "cuda"
        return Estimate(
            recipe=request.recipe,
            samples=len(setup.samples),
            tokens=setup.tokens,
            device=setup.model.device.type,
            layers=tuple(kinds),
            of=setup.model.count,
            parts=tuple(parts),
            memory=_peak() + (0 if gpu else counted),
            gpu_memory=torch.cuda.max_memory_allocated() + counted if gpu else 0,
            counted=counted,
            disk=room_for(plan, setup, passes),
        )


@dataclass(frozen=True, slots=True)
class _Ran:
    """A layer that was run: the seconds of each step, its costs, and the states that leave it."""

    seconds: Sequence[tuple[str, float]]
    costs: LayerCosts
    leaving: Activations


def _kinds(setup: Setup) -> dict[int, int]:
    """The first layer of each kind, and how many there are of it."""
    first: dict[Any, int] = {}
    found: dict[int, int] = {}
    for number in range(setup.model.count):
        kind = kind_of(setup.model.hollow(number)), setup.groups[number]
        number = first.setdefault(kind, number)
        found[number] = found.get(number, 0) + 1
    return found


def _run(number: int, setup: Setup, plan: Plan, entering: Activations, folder: Path) -> _Ran:
    """Do with a layer what a calibration does; `entering` has all samples, and is used up."""
    journal = LayerJournal(folder, setup.job(plan))
    entering.path.replace(journal.states(number))
    entering, device = Activations(journal.states(number)), setup.model.device
    # 1) Costs, of the samples that they are measured on
    numbers = probed(len(setup.samples), setup.tokens)
    own, leaving = Activations(folder / "own.bin"), Activations(folder / "leaving.bin")
    own.write(states for at, states in enumerate(entering.states(device)) if at in numbers)
    start = time.perf_counter()
    forwards_through(number, setup, numbers, own, leaving)
    forwards = time.perf_counter()
    generator = torch.Generator(device).manual_seed(0)
    gradients = [
        States(torch.randn(each.hidden.shape, generator=generator, device=device) * 1e-3) for each in own.states(device)
    ]
    paths = [path for group in setup.groups[number] for path in group.consumers]
    _, costs = backwards_through(number, setup, numbers, paths, own, gradients)
    backwards = time.perf_counter()
    # 2) Calibration, of all samples
    measured = MeasuredCosts([*[{}] * number, costs], numbers, setup.tokens)
    chosen = frozenset(module_name(d.tensor.name) for d in plan.decisions if d.quantize)
    calibrate_one(number, Pass(setup, measured, chosen, journal))
    for file in (*folder.glob("layer-*"), journal.states(number + 1)):
        file_sha256(file)
    calibrated = time.perf_counter()
    seconds = {
        "costs, forwards": forwards - start,
        "costs, backwards": backwards - forwards,
        "calibrate": calibrated - backwards,
    }
    return _Ran([*seconds.items()], costs, Activations(journal.states(number + 1)))


def _head(setup: Setup, states: Activations, numbers: Sequence[int]) -> list[Part]:
    """Time the head: to read it, and what one sample takes."""
    one = Activations(states.path.with_name("one.bin"))
    one.write(States(each.hidden) for each in islice(states.states(setup.model.device), 1))
    start = time.perf_counter()
    for _ in setup.model.head_rows(max(1, VALUES // setup.tokens)):
        pass
    read = time.perf_counter() - start
    at_the_end(setup, numbers[:1], one)
    sample = max(0.0, time.perf_counter() - start - 2 * read)
    return [Part("read the head", read, 1), Part("costs, one sample at the head", sample, len(numbers))]


def _peak() -> int:
    """Bytes: the most memory that this process has had."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024
