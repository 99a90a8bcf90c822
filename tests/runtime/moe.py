"""Small random mixtures of experts, as transformers writes them, and with their experts in INT8."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import w8a8
from tests.serve.embedded.servers import TEMPLATE, VOCABULARY, word_tokenizer
from w8a8.checkpoint import Checkpoint
from w8a8.plan.architectures import architecture_of
from w8a8.quantization import Options
from w8a8.sources.opening import view
from w8a8.sources.rows import RowReader

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
    "vocab_size": VOCABULARY,
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
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**_LATENT, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {**_LATENT, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "glm4_moe": ("Glm4MoeForCausalLM", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_layer_start_index": 1}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "gemma4": (
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "global_head_dim": 16, "top_k_experts": 2, "hidden_size_per_layer_input": 0,
         "vocab_size_per_layer_input": VOCABULARY, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", {"vision": _VISION}),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "llama4": ("Llama4ForCausalLM", {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {"layers_block_type": ["attention", "moe"], "n_group": 1, "topk_group": 1,
         "moe_shared_expert_intermediate_size": 64},
    ),
    "jamba": (
        "JambaForCausalLM",
        {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
}  # fmt: skip
"""Family -> the class of transformers, and what its config has besides `_TEXT`."""


def make(folder: Path, family: str) -> Path:
    """Write a small model of `family` in BF16, and a tokenizer whose every token is a word."""
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
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def quantize(source: Path, out: Path, spelling: str = "compressed-tensors") -> Path:
    """Quantize a checkpoint, its experts too: by hand those of GPT-OSS, which vLLM does not take."""
    w8a8.quantize(source, out, Options(format=spelling))
    if source.name == "gpt_oss":
        checkpoint = Checkpoint.open(source)
        seen, reader = view(checkpoint, architecture_of(checkpoint.config).stacks), RowReader(source)
        stacks = {stack.name for stack in seen.stacks.values()}
        tensors = {name: tensor for name, tensor in tensors_of(out).items() if name not in stacks}
        for name in seen.stacks:
            values = torch.from_numpy(reader.values(seen.tensors[name]))
            if name.endswith(".bias"):
                tensors[name] = values.to(torch.bfloat16)
                continue
            scale = values.abs().amax(1, keepdim=True) / 127
            tensors |= {name: (values / scale).round().to(torch.int8), f"{name}_scale": scale}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors."""
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
