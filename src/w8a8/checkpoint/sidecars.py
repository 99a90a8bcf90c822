"""Sorts the files beside the weights: which travel with the checkpoint, which stay behind, and why.

A file travels when something needs it to load, run or lawfully pass on the model: configs, tokenizer, chat template,
processor, remote code (copied as text, never run), licence texts, the layers that sentence-transformers puts behind it.
Everything else stays behind and is named.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from w8a8.reading import MAX_JSON_BYTES, UnfitError, convert, parse_json, read_bytes

_TRAVELS = re.compile(
    r"""(?ix)
    .*\.(json|jinja|model(\.v\d\w*)?|tiktoken|vocab|merges|txt|py|bpe|spm)
  | (licen[cs]e|notice|copying|use_policy|gemma_.*terms)[^/]*
  | additional_chat_templates/[^/]+\.jinja
    """
)
MODULE_DEPTH = 3
"""Folders within the folder of a module; sentence-transformers writes none but for its routers."""

_REASONS = (
    (
        re.compile(r"(?i).*\.(bin|pt|pth|ckpt|pkl|msgpack|h5|ot)(\.index\.json)?"),
        "other weights (pickled or non-torch)",
    ),
    (re.compile(r"(?i).*\.(gguf|ggml|onnx|onnx_data|tflite|mlmodel|nemo|engine|llamafile)"), "other weight format"),
    (
        re.compile(r"(?i).*\.safetensors(\.index\.json)?"),
        "a duplicate of the weights, which transformers does not read",
    ),
    (re.compile(r"(?i)readme(\..*)?"), "describes the source, not the result"),
    (re.compile(r"(?i)params\.json"), "config of the consolidated duplicate"),
)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that is not copied, and why."""

    name: str
    reason: str


def sort_files(folder: Path, weights: set[str]) -> tuple[tuple[str, ...], tuple[LeftOut, ...]]:
    """Sort what lies in `folder` besides its `weights` into `(sidecars, left_out)`; names are relative to it.

    Raises `OSError`, `UnreadableError`.
    """
    sidecars: list[str] = []
    left_out: list[LeftOut] = []
    modules = _module_folders(folder)
    for name in sorted(_files(folder, modules)):
        if name in weights:
            continue
        home, within, _ = name.partition("/")
        weights_of_module = within and home in modules and name.endswith(".safetensors")
        reason = next((why for pattern, why in _REASONS if pattern.fullmatch(name)), None)
        if weights_of_module or (reason is None and _TRAVELS.fullmatch(name)):
            sidecars.append(name)
        else:
            left_out.append(LeftOut(name, reason or "not needed to load the model"))
    return tuple(sidecars), tuple(left_out)


@dataclass(frozen=True, slots=True)
class _Module:
    """A step of a sentence-transformers model: the transformer itself (""), or the folder of a layer behind it."""

    path: str = ""


def _module_folders(folder: Path) -> set[str]:
    """The folders that `modules.json` names, if it is one of sentence-transformers: pooling, dense layers."""
    file = folder / "modules.json"
    try:
        modules = convert(parse_json(read_bytes(file, MAX_JSON_BYTES)), list[_Module]) if file.exists() else []
    except UnfitError:  # travels like any other JSON file
        return set()
    return {module.path.rstrip("/") for module in modules}


def _files(folder: Path, modules: set[str]) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield entry.name
        elif entry.name == "additional_chat_templates":
            yield from (f"{entry.name}/{child.name}" for child in entry.iterdir())
        elif entry.name in modules:
            yield from (path.relative_to(folder).as_posix() for path in _below(entry, MODULE_DEPTH))
        else:
            yield f"{entry.name}/"


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """The files in `folder`, and in its folders down to `depth`; links to folders are not followed."""
    for entry in folder.iterdir():
        if depth and entry.is_dir() and not entry.is_symlink():
            yield from _below(entry, depth - 1)
        elif not entry.name.startswith("."):
            yield entry
