"""The inputs of a calibration, checked against each other: the model, and the samples of a text."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from w8a8.calibrate.activations import Activations
from w8a8.calibrate.grouping import groups_of_layers
from w8a8.calibrate.inputs import Inputs
from w8a8.calibrate.journal import Job
from w8a8.calibrate.request import Request
from w8a8.checkpoint.stream import Identity
from w8a8.errors import UsageError
from w8a8.machine import available_memory
from w8a8.plan import Plan
from w8a8.recipes.groups import Group
from w8a8.runtime.calls import Call, States
from w8a8.runtime.loading import load_tokenizer
from w8a8.runtime.samples import HERE, Hands
from w8a8.runtime.streamed import StreamedModel
from w8a8.sources.opening import with_stacks
from w8a8.sources.view import LogicalTensor, View
from w8a8.texts import samples as texts
from w8a8.texts.samples import CalibrationText
from w8a8.version import __version__


@dataclass(frozen=True, slots=True)
class Setup:
    """What all layers and passes share. `samples` are token ids, all of the same length.

    `groups` are those of each layer, `inputs` the arguments of its `forward` other than the states. `notice` takes
    sentences for the user; `hands` run the samples.
    """

    model: StreamedModel
    view: View
    request: Request
    text: CalibrationText
    samples: Sequence[Sequence[int]]
    groups: Sequence[tuple[Group, ...]]
    inputs: Inputs
    notice: Callable[[str], None]
    hands: Hands = HERE

    @classmethod
    def of(cls, name: str, view: View, plan: Plan, request: Request, notice: Callable[[str], None]) -> "Setup":
        """Build the model without its layers, load the text, and cut the samples.

        Experts that the `plan` quantizes lie apart in the model.

        Raises the errors of `texts.load` and `StreamedModel`, UnsupportedModelError for a model without groups,
        UsageError where the text is too short or the samples are too long for the model.
        """
        quantized = {decision.tensor.name for decision in plan.decisions if decision.quantize}
        whole = {stack.name for stack in view.stacks.values()}
        whole -= {stack.name for part, stack in view.stacks.items() if part in quantized}
        model = StreamedModel(name, with_stacks(view, whole), torch.float32, _room())
        text = texts.load(request.text)
        if request.text is None:
            notice(
                "no --calibration given: using the small built-in text; a text like the model's future input is better"
            )
        samples = _samples(name, model, text, request, notice)
        groups = groups_of_layers(model, view.config, samples[0], notice)
        return cls(model, view, request, text, samples, groups, Inputs(model.embed(samples[0])[1]), notice)

    @property
    def tokens(self) -> int:
        """Number of tokens in each sample."""
        return len(self.samples[0])

    def embedded(self, numbers: Iterable[int]) -> Iterator[States]:
        """The states that enter the first layer, of the samples with these numbers."""
        return (States(self.model.embed(self.samples[number])[0]) for number in numbers)

    def calls(self, layer: int, entering: Activations, numbers: Iterable[int]) -> Iterator[Call]:
        """The calls of a layer, of the samples with these numbers, whose states are in a file."""
        device = self.model.device
        return self.inputs.calls(layer, entering.states(device), numbers, device)

    def weight(self, layer: int, path: str) -> LogicalTensor:
        """The weight of the module `path` inside the `layer`th layer."""
        return self.model.tensor(layer, f"{path}.weight")

    def job(self, plan: Plan) -> Job:
        """What decides the result: this version, the source files as they are now, the text, and the options."""
        values = [list(map(list, self.samples)), [[d.tensor.name, d.quantize] for d in plan.decisions]]
        return Job(
            version=__version__,
            recipe=self.request.recipe,
            samples_and_plan=hashlib.sha256(json.dumps(values).encode()).hexdigest(),
            sources={shard.name: Identity.of(self.view.path / shard.stored.name) for shard in self.view.shards},
            device=self.model.device.type,
        )


def _room() -> int:
    """The bytes that the experts of a layer may take: half of what is free where layers are run."""
    return (torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_memory()) // 2


def _samples(
    name: str, model: StreamedModel, text: CalibrationText, request: Request, notice: Callable[[str], None]
) -> list[tuple[int, ...]]:
    """Cut the text into samples of token ids."""
    limit = getattr(model.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if request.tokens > (limit or request.tokens):
        raise UsageError(f"--tokens {request.tokens}: {name} reads {limit} tokens at most")
    samples = texts.cut(text, load_tokenizer(name, model.folder), samples=request.samples, tokens=request.tokens)
    notice(f"calibrating on {len(samples)} samples of {request.tokens} tokens, {text.name}, on {model.device.type}")
    if len(samples) < request.samples:
        notice(f"{text.name} is too short for {request.samples} samples; a longer text is better")
    return samples
