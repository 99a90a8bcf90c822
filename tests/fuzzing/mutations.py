"""Damage a file: its bytes, the JSON in it, or what kind of file it is."""

import json
import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checkpoint.files import split_shard

HUGE = (2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(2**63))
NUMBERS = (0, 1, -1, 2, 3, 7, 16, 255, 4096, *HUGE, 0.5, 1.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf)
TEXTS = (
    *(
        "",
        "\0",
        "\ud800",
        "😀",
        "x" * 300,
        "x" * 100_000,
        "../../x",
        "/etc/passwd",
        ".",
        "..",
        "a/b",
        "a\\b",
        "\n- x: y",
    ),
    *("yarn", "linear", "sliding_attention", "full_attention", "quark", "compressed-tensors", "int8", "per_channel"),
    *(
        "BF16",
        "I8",
        "F32",
        "F4",
        "model.safetensors",
        "llama",
        "gemma3",
        "qwen3_5",
        "re:(",
        "re:a{999}{999}",
        "re:.*",
        "1e9",
    ),
)
KEYS = (
    *("text_config", "vision_config", "quantization_config", "compression_config", "rope_scaling", "rope_parameters"),
    *("rope_type", "type", "factor", "partial_rotary_factor", "layer_types", "sliding_window", "use_sliding_window"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
    *("model_type", "architectures", "exclude", "ignore", "quant_method", "__metadata__", "dtype", "data_offsets"),
    *("hidden_size_per_layer_input", "num_kv_shared_layers", "original_max_position_embeddings", "chat_template"),
    *("full_attention", "sliding_attention", "mamba_ssm_dtype", "full_attention_interval", "torch_dtype", "path"),
)
SNIPPETS = (
    b"\xef\xbb\xbf",
    b"\xff",
    b"\0",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b'"',
    b"\\ud83d",
    b"1e999",
    b"NaN",
    b"\n",
    b"---\n",
    b"&a *a",
)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 5\n"


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with some damage; JSON, also that of a safetensors header, most often stays JSON."""
    if rng.random() < 0.002:
        return bomb(rng)
    if rng.random() < 0.3:
        return _bytes(content, rng)
    if content[:1] in (b"{", b"["):
        lines = content.rstrip(b"\n").split(b"\n")
        at = rng.randrange(len(lines)) if _is_json(lines[0]) else None
        if at is None:
            return _json(content, rng)
        lines[at] = _json(lines[at], rng)  # one line of JSONL
        return b"\n".join(lines) + b"\n" * rng.randrange(2)
    if content[8:9] == b"{":
        header, data = split_shard(content)
        text = _json(header, rng)
        return struct.pack("<Q", len(text)) + text + data
    return _bytes(content, rng)


def bomb(rng: random.Random) -> bytes:
    """A file that takes much more than it is long, if it is let."""
    count = rng.choice([10_000, 1_000_000, 5_000_000])
    index = b'{"weight_map": {' + b",".join(b'"%d":"%d"' % (i, i) for i in range(count // 20)) + b"}}"
    wide = b'{"\xf0\x9f\x98\x80": "' + b"x" * count + b'"}'
    values = b'{"a":[' + b"[]," * count + b"0]}"
    text = rng.choice([b"[" * count, b'{"a":' * count, b"9" * count, b"---\n" + b"\n" * count, values, wide, index])
    return text if rng.random() < 0.5 else struct.pack("<Q", len(text)) + text


def no_file(path: Path, rng: random.Random) -> None:
    """Put something at `path` that is no file, or one of another kind."""
    kinds: list[Callable[[], object]] = [
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("/etc/passwd"),
        lambda: path.symlink_to("nowhere"),
        lambda: path.write_bytes(POINTER),
        lambda: path.write_bytes(b""),
        lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC), 3 << 30),
    ]
    rng.choice(kinds)()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _bytes(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(changed))
        match rng.randrange(5):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[at:at] = rng.choice(SNIPPETS) * rng.choice([1, 1, 2, 200])
            case 2:
                del changed[at : at + rng.choice([1, 2, 40])]
            case 3:
                start = rng.randint(0, len(changed))
                changed[at:at] = changed[start : start + rng.randint(0, 200)]
            case _:
                del changed[rng.choice([at, len(changed)]) :]
    return bytes(changed)


def _json(text: bytes, rng: random.Random) -> bytes:
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _changed(value, rng)
    written = json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:  # a name that stands twice
        written = written.replace(b"{", b'{"' + rng.choice(KEYS).encode() + b'": 1, ', 1)
    return b"\xef\xbb\xbf" + written if rng.random() < 0.02 else written


def _changed(value: Any, rng: random.Random) -> Any:
    """The value with one of its parts replaced, removed, renamed, added, or taken from elsewhere in it."""
    place, other = _place(value, rng), _place(value, rng)
    if place is None or other is None:
        return _any(rng)
    container, key = place
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[rng.choice([*KEYS, *TEXTS])] = container.pop(key)
        case 2:
            container[key] = json.loads(json.dumps(other[0][other[1]]))
        case 3 if isinstance(container, dict):
            container[rng.choice(KEYS)] = _any(rng)
        case 4 if isinstance(container[key], list):
            container[key] = container[key] * rng.choice([2, 30])
        case _:
            container[key] = _any(rng)
    return value


def _place(value: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A container in the value, at any depth, and one of its keys or indexes."""
    while isinstance(value, dict | list) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        child = value[key]
        if not isinstance(child, dict | list) or not child or rng.random() < 0.3:
            return value, key
        value = child
    return None


def _any(rng: random.Random, depth: int = 3) -> Any:
    match rng.randrange(9):
        case 0 | 1:
            return rng.choice(NUMBERS)
        case 2 | 3:
            return rng.choice(TEXTS)
        case 4:
            return rng.choice([None, True, False])
        case 5 if depth:
            return [_any(rng, depth - 1) for _ in range(rng.randrange(4))]
        case 6 if depth:
            return {rng.choice(KEYS): _any(rng, depth - 1) for _ in range(rng.randrange(4))}
        case 7:
            nested: Any = None
            for _ in range(rng.choice([1, 2, 50, 150, 900])):
                nested = [nested] if rng.random() < 0.5 else {"a": nested}
            return nested
        case _:
            return rng.choice([[], {}, 1, ""])
