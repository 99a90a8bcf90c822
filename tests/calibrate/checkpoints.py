"""Small random models that read characters, of every architecture that has groups of its own."""

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast, set_seed

KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Glm4")
WORDS = ["<s>", *"\n ", *string.ascii_letters, *string.digits, *".,:;'?!"]
LOUD = 7
"""A channel of the states that is twenty times louder than others."""

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def make(folder: Path, kind: str = "Llama", dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """Write the checkpoint of a small model, and its tokenizer, into `folder`."""
    set_seed(3)
    head = {} if kind in {"Qwen2", "Olmo2", "Granite"} else {"head_dim": 16}
    padding = {"pad_token_id": 0} if kind == "Glm4" else {}  # by default one of its own tokenizer's
    values = {**_SHAPE, **head, **padding, **config}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values)).to(dtype)
    model.model.embed_tokens.weight.data[:, LOUD] *= 20
    model.save_pretrained(folder, max_shard_size="100kB")
    write_tokenizer(folder)
    return folder


def make_elastic_gemma(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a small Gemma 4 as E2B is: its last layers share keys and values, and all read per-layer inputs."""
    set_seed(3)
    head = {"head_dim": 16, "global_head_dim": 32, "num_kv_shared_layers": 3}
    inputs = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": len(WORDS)}
    kinds = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 16}
    config = transformers.Gemma4TextConfig(**{**_SHAPE, **head, **inputs, **kinds})
    transformers.Gemma4ForCausalLM(config).to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of characters into a checkpoint's folder."""
    characters = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[], unk_token=" "))
    characters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=characters, bos_token="<s>").save_pretrained(folder)


def write_text(folder: Path) -> Path:
    """A text long enough for a dozen samples of 48 characters."""
    path = folder / "miller.txt"
    path.write_text("The miller had gone down to the river, 12 of 30. " * 16)
    return path
