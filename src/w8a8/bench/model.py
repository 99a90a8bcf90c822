"""Gemma 4 31B, which every benchmark measures: the sizes of its layers, and a model of some of them."""

from typing import Any

HIDDEN, INTERMEDIATE, Q, KV = 5376, 21504, 8192, 4096
FULL_Q, FULL_KV = 16384, 2048
"""Rows of q_proj and k_proj in a layer that attends to all tokens."""
LAYERS = 60
VOCABULARY = 262_144
LAYER = {
    "self_attn.q_proj": (Q, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, Q),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
"""[out, in] of the linear layers in a decoder layer with sliding attention."""
LAYER_BYTES = 2 * sum(rows * columns for rows, columns in LAYER.values())
"""Bytes of their weights in BF16."""
MLP_SHAPES = ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
"""[out, in] of gate_proj and up_proj, and of down_proj."""
GEMMA_4_31B = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": 4,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}
"""transformers' config of the text model; by its defaults every 6th layer attends to all tokens."""


def make_model(layers: int, shapes: dict[str, Any]) -> Any:
    """Make a `Gemma4ForCausalLM` in BF16 of the sizes `shapes`, its large weights cut from one pool of random numbers.

    The vocabulary is cut to the same share of the whole as the layers.
    """
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(**shapes, num_hidden_layers=layers, vocab_size=VOCABULARY * layers // LAYERS)
    pool = torch.randn(1 << 24).mul_(0.02).to(torch.bfloat16)
    with torch.device("meta"):
        model = Gemma4ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            flat = module.weight.view(-1)
            for at in range(0, flat.numel(), pool.numel()):
                part = flat[at : at + pool.numel()]
                part.copy_(pool[: part.numel()])
            module.weight._is_hf_initialized = True  # so that only the small rest is initialized
    model.init_weights()
    return model.eval()
