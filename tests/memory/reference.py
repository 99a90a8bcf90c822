"""Models to plan for, as headers without files: Gemma 4 31B, and every family's small one with its whole config.

`scripts/record_architecture.py` writes `vllm.json`, `tensors.json` and, for the other families, `../plan/names`.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from tests.named import Family, headers, plan_of
from tests.plan.test_reference_case import (
    HIDDEN,
    LAYERS,
    VISION_HIDDEN,
    VISION_LAYERS,
    VOCABULARY,
    Shapes,
    decoder_layer,
    vision_layer,
)
from w8a8.checkpoint import Checkpoint

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "vllm.json").read_text())
TENSORS: dict[str, dict[str, list[int]]] = json.loads((Path(__file__).parent / "tensors.json").read_text())
INT8: dict[str, Any] = json.loads((Path(__file__).parent / "int8.json").read_text())
FAMILIES = tuple(RECORDED["families"])
IN_INT8 = tuple(name for name, entry in RECORDED["families"].items() if "int8" in entry)


@cache
def gemma4_31b(format: str | None = "quark") -> Checkpoint:  # noqa: A002
    """Gemma 4 31B quantized in a format, or (None) as it is in BF16: all its tensors, its whole config."""
    checkpoint = headers({name: ("BF16", s) for name, s in _shapes().items()}, RECORDED["gemma4_31b"]["config"])
    if format is None:
        return checkpoint
    plan = plan_of(checkpoint, format)
    return headers({w.name: (w.dtype, w.shape) for w in plan.writes()}, plan.config)


def family(name: str, *, context: int | None = None, **config: Any) -> Checkpoint:
    """A family's small model, unquantized, with entries of its config changed and made for a longer `context`."""
    whole = {**RECORDED["families"][name]["config"], **config}
    if context:
        long = {"max_position_embeddings": context}
        whole.update({"text_config": {**whole["text_config"], **long}} if "text_config" in whole else long)
    return headers({n: ("BF16", shape) for n, shape in _tensors(name).items()}, whole)


def family_in_int8(name: str) -> Checkpoint:
    """A family's small model with its linear layers and experts in INT8, whether this version can make it or not."""
    tensors = {}
    for tensor, shape in _tensors(name).items():
        linear = len(shape) > 1 and not re.search(r"embed|norm|conv", tensor) and not _ignored(tensor)
        tensors[tensor] = ("I8" if linear else "BF16", shape)
        if linear:
            tensors[f"{tensor}_scale"] = ("F32", (*shape[:-1], 1))
    return headers(tensors, {**RECORDED["families"][name]["config"], "quantization_config": INT8})


def _tensors(name: str) -> Shapes:
    if name in TENSORS:
        return {tensor: tuple(shape) for tensor, shape in TENSORS[name].items()}
    return {tensor: spec.shape for tensor, spec in Family.load(name).checkpoint.tensors.items()}


def _ignored(tensor: str) -> bool:
    module = tensor.removesuffix(".weight")
    patterns = (re.compile(entry.removeprefix("re:")) for entry in INT8["ignore"])
    return not tensor.endswith(".weight") or any(pattern.fullmatch(module) for pattern in patterns)


def _shapes() -> Shapes:
    shapes: Shapes = {
        "model.language_model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.language_model.norm.weight": (HIDDEN,),
        "model.embed_vision.embedding_projection.weight": (HIDDEN, VISION_HIDDEN),
        "model.vision_tower.patch_embedder.position_embedding_table": (2, 10240, VISION_HIDDEN),
        "model.vision_tower.patch_embedder.input_proj.weight": (VISION_HIDDEN, 768),
    }
    norms: Shapes = {f"self_attn.{leaf}_norm.weight": (72,) for leaf in "qk"}
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        norms[f"{norm}_layernorm.weight"] = (VISION_HIDDEN,)
    for i in range(LAYERS):
        shapes |= {f"model.language_model.layers.{i}.{name}": s for name, s in decoder_layer(i).items()}
    for i in range(VISION_LAYERS):
        layer = {**vision_layer(), **norms}
        shapes |= {f"model.vision_tower.encoder.layers.{i}.{name}": s for name, s in layer.items()}
    return shapes
