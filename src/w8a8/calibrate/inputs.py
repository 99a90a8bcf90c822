"""What the layers of a model read besides states, for the samples of a calibration.

What is a sample's own (`w8a8.runtime.calls`) lies in a file for each sample; most models have none.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from w8a8.runtime.calls import Call, States
from w8a8.runtime.streamed import StreamedModel
from w8a8.storage.folders import keep_only
from w8a8.storage.writer import disk_errors, write_whole


@dataclass(frozen=True, slots=True)
class Inputs:
    """The arguments of each layer's `forward` other than the states: `common` to all samples, and a sample's `own`.

    `own` has a file for each sample whose arguments differ from those in common, by its number: tensors by the number
    of the layer and the name of the argument.
    """

    common: Sequence[Mapping[str, Any]]
    own: Mapping[int, Path] = field(default_factory=dict)

    def stored(self, model: StreamedModel, samples: Sequence[Sequence[int]], folder: Path) -> Self:
        """Let the model read all samples, and write what is a sample's own into `folder`.

        Raises UnsupportedModelError where that is no tensor; DiskFullError, UnwritableError.
        """
        files: dict[int, Path] = {}
        for number, sample in enumerate(samples):
            if found := _own(model, sample, self.common):
                if not files:
                    with disk_errors(folder):
                        keep_only(folder, ())
                files[number] = folder / f"sample-{number:05}.safetensors"
                write_whole(files[number], save(found), resumable=True)
        return replace(self, own=files)

    def calls(
        self, layer: int, states: Iterable[States], numbers: Iterable[int], device: torch.device
    ) -> Iterator[Call]:
        """Yield the calls of a layer for the `states` of the samples with these `numbers`, in order."""
        for number, each in zip(numbers, states, strict=True):
            yield Call(each, {**self.common[layer], **self._own(layer, number, device)})

    def _own(self, layer: int, number: int, device: torch.device) -> dict[str, Tensor]:
        """A sample's own arguments for a layer."""
        if number not in self.own:
            return {}
        prefix = f"{layer}."
        with safe_open(self.own[number], "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
            return {name.removeprefix(prefix): file.get_tensor(name).to(device) for name in names}


def _own(model: StreamedModel, sample: Sequence[int], common: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A sample's own arguments, by the number of the layer and the name."""
    found = enumerate(model.own(model.embed(sample)[1], common))
    return {f"{layer}.{name}": value.cpu().contiguous() for layer, each in found for name, value in each.items()}
