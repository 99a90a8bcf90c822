"""Layers left alone are excluded by patterns where engines may have them in other modules."""

from w8a8.formats.ignoring import whole_modules, within

QUANTIZED = {"model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"}


def test_a_module_without_a_quantized_layer_has_a_pattern() -> None:
    assert whole_modules(QUANTIZED, {"model.visual.blocks.0.attn.qkv"}) == [within("visual")]


def test_a_layer_beside_the_numbered_ones_has_a_pattern() -> None:
    left = {"lm_head", "model.per_layer_model_projection", "model.layers.0.mlp.gate"}
    assert whole_modules(QUANTIZED, left) == [within("per_layer_model_projection")]
