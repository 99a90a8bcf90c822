"""Small GGUF files of several architectures, with random weights, as llama.cpp's converter lays them out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from w8a8.checkpoint.gguf import GGML_TYPES

HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}
"""Where a block has its F16 scales."""

HIDDEN, FEED, VOCABULARY = 256, 512, 300
HEADS, KEYS, HEAD = 4, 2, 64

COMMON: Mapping[str, Any] = {
    "context_length": 512,
    "embedding_length": HIDDEN,
    "block_count": 2,
    "feed_forward_length": FEED,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KEYS,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
}
MIXED = ("Q4_K", "Q6_K", "Q8_0", "Q5_0", "Q5_K", "IQ4_NL", "Q3_K", "Q2_K", "IQ4_XS", "Q4_0", "BF16", "F16")

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def attention(layer: int, heads: int = HEADS) -> Shapes:
    yield f"blk.{layer}.attn_q.weight", (heads * HEAD, HIDDEN)
    yield f"blk.{layer}.attn_k.weight", (KEYS * HEAD, HIDDEN)
    yield f"blk.{layer}.attn_v.weight", (KEYS * HEAD, HIDDEN)
    yield f"blk.{layer}.attn_output.weight", (HIDDEN, HEADS * HEAD)


def feed(layer: int) -> Shapes:
    yield f"blk.{layer}.ffn_gate.weight", (FEED, HIDDEN)
    yield f"blk.{layer}.ffn_up.weight", (FEED, HIDDEN)
    yield f"blk.{layer}.ffn_down.weight", (HIDDEN, FEED)


def norms(layer: int, *names: str, size: int = HIDDEN) -> Shapes:
    yield from ((f"blk.{layer}.{name}.weight", (size,)) for name in names)


def ends(*, tied: bool = False) -> Shapes:
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    if not tied:
        yield "output.weight", (VOCABULARY, HIDDEN)


def llama() -> Shapes:
    yield from ends(tied=True)
    yield "rope_freqs.weight", (HEAD // 2,)
    for layer in range(2):
        yield from (*norms(layer, "attn_norm", "ffn_norm"), *attention(layer), *feed(layer))


def qwen2() -> Shapes:
    yield from ends()
    for layer in range(2):
        yield from (*norms(layer, "attn_norm", "ffn_norm"), *attention(layer), *feed(layer))
        yield f"blk.{layer}.attn_q.bias", (HEADS * HEAD,)
        yield f"blk.{layer}.attn_k.bias", (KEYS * HEAD,)
        yield f"blk.{layer}.attn_v.bias", (KEYS * HEAD,)


def gemma2() -> Shapes:
    yield from ends(tied=True)
    for layer in range(2):
        yield from (*attention(layer), *feed(layer))
        yield from norms(layer, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")


def qwen3moe() -> Shapes:
    yield from ends()
    for layer in range(2):
        yield from (*norms(layer, "attn_norm", "ffn_norm"), *attention(layer))
        yield from norms(layer, "attn_q_norm", "attn_k_norm", size=HEAD)
        yield f"blk.{layer}.ffn_gate_inp.weight", (4, HIDDEN)
        yield f"blk.{layer}.ffn_gate_exps.weight", (4, FEED, HIDDEN)
        yield f"blk.{layer}.ffn_up_exps.weight", (4, FEED, HIDDEN)
        yield f"blk.{layer}.ffn_down_exps.weight", (4, HIDDEN, FEED)


def lfm2() -> Shapes:
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    yield "token_embd_norm.weight", (HIDDEN,)
    yield from (*norms(0, "attn_norm", "ffn_norm"), *feed(0))
    yield "blk.0.shortconv.in_proj.weight", (3 * HIDDEN, HIDDEN)
    yield "blk.0.shortconv.out_proj.weight", (HIDDEN, HIDDEN)
    yield "blk.0.shortconv.conv.weight", (HIDDEN, 3)
    yield from (*norms(1, "attn_norm", "ffn_norm"), *attention(1), *feed(1))
    yield from norms(1, "attn_q_norm", "attn_k_norm", size=HEAD)


def qwen35() -> Shapes:
    yield from ends()
    yield from (*norms(0, "attn_norm", "post_attention_norm"), *feed(0))
    yield "blk.0.attn_qkv.weight", (2 * 64 + 256, HIDDEN)  # 2 key heads of 32, 8 value heads of 32
    yield "blk.0.attn_gate.weight", (256, HIDDEN)
    yield "blk.0.ssm_alpha.weight", (8, HIDDEN)
    yield "blk.0.ssm_beta.weight", (8, HIDDEN)
    yield "blk.0.ssm_conv1d.weight", (2 * 64 + 256, 4)
    yield "blk.0.ssm_norm.weight", (32,)
    yield "blk.0.ssm_out.weight", (HIDDEN, 256)
    yield "blk.0.ssm_a", (8,)
    yield "blk.0.ssm_dt.bias", (8,)
    yield from (*norms(1, "attn_norm", "post_attention_norm"), *attention(1, 2 * HEADS), *feed(1))
    yield from norms(1, "attn_q_norm", "attn_k_norm", size=HEAD)


def bloom() -> Shapes:
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    for end in ("weight", "bias"):
        yield f"token_embd_norm.{end}", (HIDDEN,)
        yield f"output_norm.{end}", (HIDDEN,)
    for layer in range(2):
        for name, rows, columns in (
            ("attn_qkv", 3 * HIDDEN, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_up", 4 * HIDDEN, HIDDEN),
            ("ffn_down", HIDDEN, 4 * HIDDEN),
        ):
            yield f"blk.{layer}.{name}.weight", (rows, columns)
            yield f"blk.{layer}.{name}.bias", (rows,)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", (HIDDEN,)
            yield f"blk.{layer}.{name}.bias", (HIDDEN,)


def biased(shapes: Shapes) -> Shapes:
    """The tensors, each with a bias."""
    for name, shape in shapes:
        yield name, shape
        yield name.replace(".weight", ".bias"), shape[:1]


def ungated(layer: int) -> Shapes:
    yield f"blk.{layer}.ffn_up.weight", (FEED, HIDDEN)
    yield f"blk.{layer}.ffn_down.weight", (HIDDEN, FEED)


def phi3() -> Shapes:
    yield from ends()
    for layer in range(2):
        yield from norms(layer, "attn_norm", "ffn_norm")
        yield f"blk.{layer}.attn_qkv.weight", ((HEADS + 2 * KEYS) * HEAD, HIDDEN)
        yield f"blk.{layer}.attn_output.weight", (HIDDEN, HEADS * HEAD)
        yield f"blk.{layer}.ffn_up.weight", (2 * FEED, HIDDEN)
        yield f"blk.{layer}.ffn_down.weight", (HIDDEN, FEED)


def starcoder2() -> Shapes:
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    yield from biased(iter([("output_norm.weight", (HIDDEN,))]))
    for layer in range(2):
        yield from biased(iter((*norms(layer, "attn_norm", "ffn_norm"), *attention(layer), *ungated(layer))))


def stablelm() -> Shapes:
    yield from (("token_embd.weight", (VOCABULARY, HIDDEN)), ("output.weight", (VOCABULARY, HIDDEN)))
    yield from biased(iter([("output_norm.weight", (HIDDEN,))]))
    for layer in range(2):
        yield from biased(norms(layer, "attn_norm", "ffn_norm"))
        yield from (*attention(layer), *feed(layer))


def nemotron() -> Shapes:
    yield from (("token_embd.weight", (VOCABULARY, HIDDEN)), ("output.weight", (VOCABULARY, HIDDEN)))
    yield from biased(iter([("output_norm.weight", (HIDDEN,))]))
    for layer in range(2):
        yield from biased(norms(layer, "attn_norm", "ffn_norm"))
        yield from (*attention(layer), *ungated(layer))


def minimax() -> Shapes:
    yield from ends()
    for layer in range(2):
        yield from (*norms(layer, "attn_norm", "ffn_norm"), *attention(layer))
        yield f"blk.{layer}.attn_q_norm.weight", (HEADS * HEAD,)
        yield f"blk.{layer}.attn_k_norm.weight", (KEYS * HEAD,)
        yield f"blk.{layer}.ffn_gate_inp.weight", (4, HIDDEN)
        yield f"blk.{layer}.exp_probs_b.bias", (4,)
        yield f"blk.{layer}.ffn_gate_exps.weight", (4, FEED, HIDDEN)
        yield f"blk.{layer}.ffn_up_exps.weight", (4, FEED, HIDDEN)
        yield f"blk.{layer}.ffn_down_exps.weight", (4, HIDDEN, FEED)


def mamba() -> Shapes:
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    for layer in range(2):
        yield from norms(layer, "attn_norm")
        yield f"blk.{layer}.ssm_in.weight", (4 * HIDDEN, HIDDEN)
        yield f"blk.{layer}.ssm_conv1d.weight", (2 * HIDDEN, 4)
        yield f"blk.{layer}.ssm_conv1d.bias", (2 * HIDDEN,)
        yield f"blk.{layer}.ssm_x.weight", (16 + 2 * 8, 2 * HIDDEN)
        yield f"blk.{layer}.ssm_dt.weight", (2 * HIDDEN, 16)
        yield f"blk.{layer}.ssm_dt.bias", (2 * HIDDEN,)
        yield f"blk.{layer}.ssm_a", (2 * HIDDEN, 8)
        yield f"blk.{layer}.ssm_d", (2 * HIDDEN,)
        yield f"blk.{layer}.ssm_out.weight", (HIDDEN, 2 * HIDDEN)


ARCHITECTURES: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "llama": (llama, {"rope.dimension_count": HEAD, "vocab_size": VOCABULARY}),
    "qwen2": (qwen2, {}),
    "gemma2": (gemma2, {"attention.key_length": HEAD, "attention.sliding_window": 128}),
    "qwen3moe": (
        qwen3moe,
        {
            "attention.key_length": HEAD,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": FEED,
        },
    ),
    "lfm2": (lfm2, {"attention.head_count_kv": [0, KEYS], "shortconv.l_cache": 3}),
    "qwen35": (
        qwen35,
        {
            "attention.key_length": HEAD,
            "full_attention_interval": 2,
            "rope.dimension_sections": [6, 5, 5, 0],
            "rope.dimension_count": 32,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 32,
            "ssm.group_count": 2,
            "ssm.time_step_rank": 8,
            "ssm.inner_size": 256,
        },
    ),
    "phi3": (phi3, {"rope.dimension_count": HEAD}),
    "starcoder2": (starcoder2, {"attention.layer_norm_epsilon": 1e-5}),
    "stablelm": (stablelm, {"attention.layer_norm_epsilon": 1e-5}),
    "nemotron": (nemotron, {}),
    "minimax-m2": (
        minimax,
        {"attention.key_length": HEAD, "rope.dimension_count": 32, "expert_count": 4, "expert_used_count": 2},
    ),
    "bloom": (bloom, {"attention.layer_norm_epsilon": 1e-5}),
    "mamba": (
        mamba,
        {
            "vocab_size": VOCABULARY,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 8,
            "ssm.time_step_rank": 16,
            "ssm.inner_size": 2 * HIDDEN,
        },
    ),
}


def write_gguf(
    path: Path,
    architecture: str,
    kinds: tuple[str, ...] = MIXED,
    *,
    skip: str = "",
    fields: Mapping[str, Any] = MappingProxyType({}),
    named: str = "",
) -> Path:
    """Write a small model; its matrices have the dtypes `kinds` in turn, as far as their rows allow.

    Without the tensor `skip`, with `fields` in place of its own, and `named` as if of another architecture.
    """
    shapes, own = ARCHITECTURES[architecture]
    architecture = named or architecture
    chance = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    for key, value in {**COMMON, **own, **fields}.items():
        adders: Mapping[type, Any] = {float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        adders[type(value)](f"{architecture}.{key}", value)
    add_tokenizer(writer)
    for number, (name, shape) in enumerate(shapes()):
        if name == skip:
            continue
        kind = kinds[number % len(kinds)] if len(shape) > 1 and "conv" not in name and "ssm_a" not in name else "F32"
        add_tensor(writer, name, shape, kind, chance)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "he", "ll"]
    tokens += [f"<|{number}|>" for number in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["h e", "l l"])
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_pad_token_id(VOCABULARY - 2)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def add_tensor(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str, chance: np.random.Generator
) -> None:
    known = next(each for each in GGML_TYPES.values() if each.name == kind)
    if shape[-1] % known.elements:
        kind = "Q8_0" if shape[-1] % 32 == 0 else "F32"
    values = chance.standard_normal(shape, np.float32)
    if name.endswith("ssm_a"):
        values = -np.exp(values)
    if kind in HALVES:
        blocks = chance.integers(0, 256, (*shape[:-1], shape[-1] // 256, known.nbytes), np.uint8)
        for at in HALVES[kind]:
            blocks[..., at : at + 2] = (chance.random((*blocks.shape[:-1], 1)) / 100).astype(np.float16).view(np.uint8)
        data: Any = blocks.reshape(*shape[:-1], -1)
    elif kind == "IQ4_NL":
        blocks = chance.integers(0, 256, (*shape[:-1], shape[-1] // 32, 18), np.uint8)
        blocks[..., :2] = np.array([0.01], np.float16).view(np.uint8)
        data = blocks.reshape(*shape[:-1], -1)
    else:
        data = quantize(values, gguf.GGMLQuantizationType[kind])
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])


def split_gguf(path: Path, folder: Path, count: int) -> None:
    """Share out a file's tensors among `count` files, as `llama-gguf-split` does: the first has all fields."""
    reader = gguf.GGUFReader(path)
    for number in range(count):
        writer = gguf.GGUFWriter(folder / f"{path.stem}-{number + 1:05}-of-{count:05}.gguf", "")
        writer.kv_data[0].clear()
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith("GGUF."):
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
