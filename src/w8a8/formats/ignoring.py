"""Patterns for whole modules that are left alone, beside the names of their layers.

Engines ask by the names that their own classes have: vLLM knows `block_sparse_moe.experts` where the file says
`block_sparse_moe.input_linear`, and `visual.blocks.0.attn.qkv_proj` where it says `attn.qkv`. What it calls a module
around them is the file's name nearly always, so that name, at any depth, is what both can agree on.
"""

import re
from collections.abc import Collection


def whole_modules(quantized: Collection[str], left_alone: Collection[str]) -> list[str]:
    """Patterns, as `re:` entries, for the outermost modules that hold layers left alone and no quantized one.

    A layer beside the numbered ones counts as such a module: vLLM has Gemma 3n's `model.per_layer_model_projection` in
    `model.self_decoder`.
    """
    parts = {part for name in quantized for part in name.split(".")}
    outermost = (
        next((part for part in _modules(name) if not (part.isdigit() or part in parts)), None) for name in left_alone
    )
    return [within(part) for part in sorted({part for part in outermost if part})]


def _modules(name: str) -> list[str]:
    """The modules around a layer, and the layer itself if it lies beside the numbered ones."""
    *around, own = name.split(".")
    return [*around, own] if around and not any(part.isdigit() for part in around) else around


def experts_left(left: Collection[str], quantized: Collection[str]) -> list[str]:
    """Patterns for the experts that are left alone: `model.layers.3.mlp.experts` means all of that layer.

    Where the experts of some layers are quantized, the others are named by all that engines know alike: the part of
    the name from the layers on; as plain text, so that engines can rename what they call otherwise.
    """
    if not quantized:
        return [within("experts")] if left else []
    ends = {name[_from_layers(name) :] for name in quantized}
    tails = (name if name[_from_layers(name) :] in ends else name[_from_layers(name) :] for name in sorted(left))
    return [rf"re:.*\b{tail}\b.*" for tail in tails]


def _from_layers(name: str) -> int:
    return max(name.find("layers."), 0)


def within(part: str) -> str:
    """The entry for all that lies in modules called `part`, and for the module itself.

    vLLM renames entries as it renames weights, as plain text: without brackets this stays a pattern whatever it does.
    """
    return rf"re:.*\b{re.escape(part)}\b.*"
