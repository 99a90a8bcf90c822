"""compressed-tensors' spelling: `X.weight` INT8 [out, in], `X.weight_scale` [out, 1], `int-quantized`.

Read by vLLM, SGLang and transformers. `ignore` lists the exact module names, as `exclude` does in Quark's spelling, and
a pattern for each component left alone as a whole: transformers and SGLang match against the names a model has in
memory, which for vision towers are not always those of the file.
"""

import re
from collections.abc import Sequence
from typing import Any

from w8a8.formats.base import Selection
from w8a8.formats.excludes import Excludes
from w8a8.formats.ignoring import within

VERSION = "0.19.0"

_RECIPE = ("re:.*lm_head", "re:.*embed_tokens.*", "re:.*vision_tower.*", "re:.*embed_vision.*")
_COMPONENTS = (
    "lm_head", "vision_tower", "vision_model", "visual", "vision_embedder", "embed_vision", "audio_tower",
    "audio_model", "embed_audio", "multi_modal_projector", "mm_projector", "mtp", "router", "experts",
)  # fmt: skip


def quantization_config(selection: Selection) -> dict[str, Any]:
    """Write the `quantization_config`: layers left alone are ignored by name, whole components by pattern."""
    parts = {part for name in selection.left_alone for part in name.split(".")}
    patterns = _harmless([within(part) for part in _COMPONENTS if part in parts], selection)
    return _config([*dict.fromkeys((*patterns, *selection.patterns)), *selection.left_alone])


def compat_config(selection: Selection) -> dict[str, Any]:
    """Write what llm-compressor writes: the caller's `ignore` list verbatim.

    The list is the usual recipe's four patterns, and the exact names of whatever else is left alone.
    """
    patterns = _harmless(_RECIPE, selection)
    excluded = Excludes(patterns)
    return _config([*patterns, *(name for name in selection.left_alone if not excluded.mean(name))])


def _harmless(patterns: Sequence[str], selection: Selection) -> list[str]:
    """Keep the patterns that match no quantized layer: a component may have been included in part.

    None of them has a number, so layers and experts that differ by one are looked at once.
    """
    names = {re.sub(r"\d+", "0", name) for name in selection.quantized}
    return [pattern for pattern in patterns if not any(map(Excludes([pattern]).mean, names))]


def _config(ignore: Sequence[str]) -> dict[str, Any]:
    """Key the config as compressed-tensors `VERSION` does."""
    return {
        "config_groups": {
            "W8A8": {
                "format": "int-quantized",
                "input_activations": _args(dynamic=True, strategy="token"),
                "output_activations": None,
                "targets": ["Linear"],
                "weights": _args(dynamic=False, strategy="channel"),
            }
        },
        "format": "int-quantized",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": VERSION,
    }


def _args(*, dynamic: bool, strategy: str) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": None,
        "num_bits": 8,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
