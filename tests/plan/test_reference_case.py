"""Gemma 4 31B, the model this tool is measured by: its tensors by name and shape, planned from headers alone."""

import pytest

from tests.named import headers, plan_of
from w8a8.plan import Plan

HIDDEN, INTERMEDIATE, VOCABULARY = 5376, 21504, 262144
HEADS, LAYERS, VISION_LAYERS, VISION_HIDDEN, VISION_INTERMEDIATE = 32, 60, 27, 1152, 4304

Shapes = dict[str, tuple[int, ...]]


def decoder_layer(index: int) -> Shapes:
    """Every sixth layer is full attention: 4 KV heads of 512, keys used as values. The others: 16 of 256, a window."""
    full = index % 6 == 5
    head, kv_heads = (512, 4) if full else (256, 16)
    shapes: Shapes = {
        "self_attn.q_proj.weight": (HEADS * head, HIDDEN),
        "self_attn.k_proj.weight": (kv_heads * head, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * head),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "layer_scalar": (1,),
    }
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"{norm}_layernorm.weight"] = (HIDDEN,)
    return shapes if full else {**shapes, "self_attn.v_proj.weight": (kv_heads * head, HIDDEN)}


def vision_layer() -> Shapes:
    square = (VISION_HIDDEN, VISION_HIDDEN)
    shapes: Shapes = {f"self_attn.{leaf}_proj.linear.weight": square for leaf in "qkvo"}
    for leaf in ("gate", "up"):
        shapes[f"mlp.{leaf}_proj.linear.weight"] = (VISION_INTERMEDIATE, VISION_HIDDEN)
    return {**shapes, "mlp.down_proj.linear.weight": (VISION_HIDDEN, VISION_INTERMEDIATE)}


@pytest.fixture(scope="module")
def plan() -> Plan:
    shapes: Shapes = {
        "model.language_model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.language_model.norm.weight": (HIDDEN,),
        "model.embed_vision.embedding_projection.weight": (HIDDEN, VISION_HIDDEN),
    }
    for i in range(LAYERS):
        shapes |= {f"model.language_model.layers.{i}.{name}": s for name, s in decoder_layer(i).items()}
    for i in range(VISION_LAYERS):
        shapes |= {f"model.vision_tower.encoder.layers.{i}.{name}": s for name, s in vision_layer().items()}
    return plan_of(headers({name: ("BF16", s) for name, s in shapes.items()}, {"model_type": "gemma4"}))


def test_62_and_a_half_gb_become_33(plan: Plan) -> None:
    assert plan.bytes_in / 1e9 == pytest.approx(62.5, abs=0.1)
    assert plan.bytes_out / 1e9 == pytest.approx(33.2, abs=0.1)


def test_every_decoder_projection_is_quantized_and_nothing_else(plan: Plan) -> None:
    quantized = [d.tensor.name for d in plan.decisions if d.quantize]
    full = LAYERS // 6
    assert len(quantized) == 7 * LAYERS - full
    assert all(".language_model.layers." in name and name.endswith("_proj.weight") for name in quantized)


def test_config_excludes_lm_head_embed_vision_and_each_layer_of_the_vision_tower(plan: Plan) -> None:
    assert len(plan.exclude) == 2 + 7 * VISION_LAYERS
    assert {"lm_head", "model.embed_vision.embedding_projection"} <= set(plan.exclude)
    assert "model.vision_tower.encoder.layers.0.mlp.up_proj.linear" in plan.exclude
    assert plan.warnings == ()
