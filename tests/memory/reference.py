"""Models to plan for, as headers without files: Gemma 4 31B, and every family's small one with its whole config."""

import json
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
FAMILIES = tuple(RECORDED["families"])


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
    tensors = Family.load(name).checkpoint.tensors
    whole = {**RECORDED["families"][name]["config"], **config}
    if context:
        long = {"max_position_embeddings": context}
        whole.update({"text_config": {**whole["text_config"], **long}} if "text_config" in whole else long)
    return headers({name: (t.dtype, t.shape) for name, t in tensors.items()}, whole)


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
