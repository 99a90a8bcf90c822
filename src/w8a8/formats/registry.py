"""The formats by name: two spellings of the same content, and three compatibility modes.

To add one, write its config in a file beside this one and give it a line in `get_format`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from w8a8.errors import UsageError
from w8a8.formats import arithmetic, compressed_tensors, quark
from w8a8.formats.base import Format

FORMATS = ("quark", "compressed-tensors")
COMPATS = {"quark-0.11": "quark", "quark-0.13": "quark", "llm-compressor-0.14": "compressed-tensors"}
"""Compatibility mode -> the format it implies."""


def get_format(name: str | None = None, compat: str | None = None, config: Mapping[str, Any] | None = None) -> Format:
    """Find the format called `name` (default: quark), or the one that reproduces the tool `compat`.

    `config` is the source's config.json. Raises `UsageError` for an unknown name, or two that contradict each other.
    """
    if compat is not None:
        if name is not None and compat in COMPATS and name != COMPATS[compat]:
            raise UsageError(f"{compat} writes format {COMPATS[compat]}, not {name}; name only one of them")
        return _compat(compat, config or {})
    if name in {None, "quark"}:
        return Format("quark", arithmetic.EXACT, _float32, _flat, quark.quantization_config)
    if name == "compressed-tensors":
        return Format(name, arithmetic.EXACT, _float32, _column, compressed_tensors.quantization_config)
    raise UsageError(f"unknown format {name!r}; there are {', '.join(FORMATS)}")


def _compat(compat: str, config: Mapping[str, Any]) -> Format:
    label = f"{COMPATS.get(compat)} (as {compat})"
    if compat == "quark-0.13":
        as_013 = partial(quark.compat_config, version=quark.VERSION_013)
        return Format(label, arithmetic.quark("F32"), _float32, _flat, as_013)
    if compat == "quark-0.11":
        observer = {"bfloat16": "BF16", "float16": "F16"}.get(str(config.get("torch_dtype")), "F32")
        as_011 = partial(quark.compat_config, version=quark.VERSION_011)
        return Format(label, arithmetic.quark(observer), _as_weight, _flat, as_011)
    if compat == "llm-compressor-0.14":
        return Format(label, arithmetic.LLM_COMPRESSOR, _as_weight, _column, compressed_tensors.compat_config)
    raise UsageError(f"unknown compatibility mode {compat!r}; there are {', '.join(COMPATS)}")


def _float32(_weight_dtype: str) -> str:
    return "F32"


def _as_weight(weight_dtype: str) -> str:
    return weight_dtype


def _flat(rows: int) -> tuple[int, ...]:
    return (rows,)


def _column(rows: int) -> tuple[int, ...]:
    return (rows, 1)
