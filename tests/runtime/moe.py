"""Small random mixtures of experts, as transformers writes them, and with their experts in INT8."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import w8a8
from w8a8.quantization import Options

EXPERTS = 4
HIDDEN = 64
INNER = 96

_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN}

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 64}),
    "mixtral": ("MixtralForCausalLM", {}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {"rotary_dim": 16}),
    "olmoe": ("OlmoeForCausalLM", {}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**_LATENT, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}),
    "glm4_moe": ("Glm4MoeForCausalLM", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_layer_start_index": 1}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "gemma4": (
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "global_head_dim": 16, "top_k_experts": 2, "hidden_size_per_layer_input": 0,
         "vocab_size_per_layer_input": 128, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", {"vision": _VISION}),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "llama4": ("Llama4ForCausalLM", {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {"layers_block_type": ["attention", "moe"], "n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 64},
    ),
    "jamba": ("JambaForCausalLM", {"use_mamba_kernels": False, "expert_layer_period": 1, "expert_layer_offset": 0}),
}  # fmt: skip
"""Family -> the class of transformers, and what its config has besides `_TEXT`."""


def make(folder: Path, family: str) -> Path:
    """Write a small model of `family` in BF16."""
    name, more = FAMILIES[family]
    kind = getattr(transformers, name)
    more = dict(more)
    vision = more.pop("vision", None)
    config_class = kind.config_class
    text = {**_TEXT, **more}
    config = config_class(**text) if vision is None else config_class(text_config=text, vision_config=vision)
    transformers.set_seed(7)
    model = kind(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def quantize(source: Path, out: Path, options: Options | None = None) -> Path:
    """Quantize a checkpoint, and by hand what `w8a8.quantize` leaves of its experts."""
    w8a8.quantize(source, out, options or Options())
    shard = out / "model.safetensors"
    tensors = load_file(shard)
    for name in list(tensors):
        for part, weight in list(_matrices(name, tensors[name])):
            rows = weight.float()
            scale = rows.abs().amax(1, keepdim=True) / 127
            tensors[f"{part}.weight"] = (rows / scale).round().to(torch.int8)
            tensors[f"{part}.weight_scale"] = scale if (options or Options()).format != "quark" else scale.reshape(-1)
            tensors.pop(name, None)
    save_file(tensors, shard, metadata={"format": "pt"})
    return out


def _matrices(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Split what is left in BF16 of a layer's experts: module and weight [out, in] of each."""
    if tensor.dtype != torch.bfloat16:
        return
    if re.search(r"\.experts\.\d+\.\w+\.weight$", name):
        yield name.removesuffix(".weight"), tensor
    if tensor.dim() != 3 or not (found := STACK.fullmatch(name)):
        return
    both = found["kind"] in {"gate_up_proj", "input_linear.weight"}
    place = found["place"].removesuffix(".experts")
    transposed = "feed_forward" in name or tensor.shape[1:] in [(HIDDEN, 2 * INNER), (INNER, HIDDEN)]
    for number, matrix in enumerate(tensor.transpose(1, 2) if transposed else tensor):
        parts = {"down_proj": matrix}
        if both:
            gate, up = (matrix[0::2], matrix[1::2]) if _interleaved(name) else matrix.chunk(2)
            parts = {"gate_proj": gate, "up_proj": up}
        for part, weight in parts.items():
            yield f"{place}.experts.{number}.{part}", weight.contiguous()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors."""
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
