"""Real models, made once per test run; tests must not write to them."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import w8a8
from tests.shared import made_once
from w8a8.formats import FORMATS
from w8a8.quantization import Options

MAKE_GEMMA = Path(__file__).parents[1] / "scripts" / "make_gemma.py"


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Gemma 3 270M, BF16, four shards; a base model without a chat template."""
    return made_once(
        tmp_path_factory,
        "gemma-3-270m",
        lambda folder: subprocess.run([sys.executable, str(MAKE_GEMMA), str(folder)], check=True),
    )


@pytest.fixture(scope="session")
def gemma3_formats(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The real Gemma 3 270M quantized, by format."""

    def made(form: str) -> Path:
        options = Options(format=form)
        return made_once(tmp_path_factory, f"gemma-3-270m-{form}", lambda out: w8a8.quantize(gemma3, out, options))

    return {form: made(form) for form in FORMATS}


@pytest.fixture(scope="session", params=FORMATS)
def gemma3_w8a8(request: pytest.FixtureRequest, gemma3_formats: Mapping[str, Path]) -> Path:
    """The real Gemma 3 270M quantized, in each format."""
    return gemma3_formats[request.param]


@pytest.fixture(scope="session")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 with a vision tower that can be served: small, random weights, real processor, a chat template."""
    return made_once(tmp_path_factory, "gemma4-small", make_gemma4)


@pytest.fixture(scope="session")
def gemma4_w8a8(gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That Gemma 4 quantized, in Quark's format."""
    return made_once(tmp_path_factory, "gemma4-small-W8A8", lambda out: w8a8.quantize(gemma4, out))


CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""

# Two sliding layers to one full one, which uses its keys as values and has no v_proj, as in the 31B.
_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
_TEXT: Mapping[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": len(_LAYERS),
    "layer_types": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # vLLM's attention on the CPU takes no smaller one
    "global_head_dim": 128,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 512,
    "sliding_window": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
_VISION: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "patch_size": 16,
    "position_embedding_size": 128,
    "pooling_kernel_size": 3,
    "default_output_length": 70,  # vLLM wants it
    "initializer_range": 0.1,
}
_SPECIAL = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def make_gemma4(folder: Path) -> Path:
    """Write the checkpoint of a small random Gemma 4 with its processor into `folder`."""
    import torch
    from transformers import (
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
        set_seed,
    )
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

    set_seed(4)
    tokenizer = _tokenizer()
    tokens = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in _SPECIAL.items()}
    config = Gemma4Config(
        text_config={**_TEXT, "vocab_size": len(tokenizer)}
        | {name: tokens[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        vision_config=dict(_VISION),
        audio_config=None,
        **{
            name: tokens[name]
            for name in ("image_token_id", "boi_token_id", "eoi_token_id", "audio_token_id", "boa_token_id")
        },
        eoa_token_index=tokens["eoa_token_id"],
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
    )
    model = Gemma4ForConditionalGeneration(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "layers" in name and "post_" in name:  # or the embeddings decide alone, and it repeats its last token
            parameter.data.fill_(5)
    model.save_pretrained(folder, max_shard_size="2MB")
    Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(),
        chat_template=CHAT_TEMPLATE,
        image_seq_length=70,
    ).save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """One token per printable character, and the special ones a Gemma 4 processor looks for."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "\n", *map(chr, range(32, 127))])}
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    usual = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        **{name: _SPECIAL[name] for name in usual},
        extra_special_tokens={name: token for name, token in _SPECIAL.items() if name not in usual},
        additional_special_tokens=["<|video|>", "<|turn>", "<turn|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
