"""Sorts the files beside the weights: which travel with the checkpoint, which stay behind, and why.

A file travels when something needs it to load, run or lawfully pass on the model: configs, tokenizer, chat template,
processor, remote code (copied as text, never run), licence texts. Everything else stays behind and is named.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TRAVELS = re.compile(
    r"""(?ix)
    .*\.(json|jinja|model|tiktoken|vocab|merges|txt|py|bpe|spm)
  | (licen[cs]e|notice|copying|use_policy|gemma_.*terms)[^/]*
  | additional_chat_templates/[^/]+\.jinja
    """
)
_REASONS = (
    (
        re.compile(r"(?i).*\.(bin|pt|pth|ckpt|pkl|msgpack|h5|ot)(\.index\.json)?"),
        "other weights (pickled or non-torch)",
    ),
    (re.compile(r"(?i).*\.(gguf|ggml|onnx|onnx_data|tflite|mlmodel|nemo|engine|llamafile)"), "other weight format"),
    (re.compile(r"(?i).*\.safetensors(\.index\.json)?"), "safetensors the index does not name (a duplicate)"),
    (re.compile(r"(?i)readme(\..*)?"), "describes the source, not the result"),
    (re.compile(r"(?i)params\.json"), "config of the consolidated duplicate"),
)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that is not copied, and why."""

    name: str
    reason: str


def sort_files(folder: Path, weights: set[str]) -> tuple[tuple[str, ...], tuple[LeftOut, ...]]:
    """Sort what lies in `folder` besides its `weights` into `(sidecars, left_out)`; names are relative to it."""
    sidecars: list[str] = []
    left_out: list[LeftOut] = []
    for name in sorted(_files(folder)):
        if name in weights:
            continue
        reason = next((why for pattern, why in _REASONS if pattern.fullmatch(name)), None)
        if reason is None and _TRAVELS.fullmatch(name):
            sidecars.append(name)
        else:
            left_out.append(LeftOut(name, reason or "not needed to load the model"))
    return tuple(sidecars), tuple(left_out)


def _files(folder: Path) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.name == "additional_chat_templates":
                yield from (f"{entry.name}/{child.name}" for child in entry.iterdir())
            else:
                yield f"{entry.name}/"
        else:
            yield entry.name
