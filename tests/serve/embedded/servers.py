"""The embedded engine in a process of its own, serving a small random W8A8 checkpoint."""

import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

import w8a8
from tests.servers import OFFLINE, Server, free_port, started

KEY = "sesame"
NAME = "some/model@main:8"
IMPATIENT = {"connections.HEAD_SECONDS": 3, "guard.BODY_SECONDS": 3, "connections.MAX_CONNECTIONS": 30}
"""Limits of slow clients that a test can wait for."""
VOCABULARY = 320
TEMPLATE = """\
{%- for m in messages -%}
  {%- if m.content == 'clown' %}{{ raise_exception('no clowns') }}{% endif -%}
  {%- if m.content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}
  {%- if m.content == 'power' %}{{ 10 ** (10 ** (m.content|length + 3)) }}{% endif -%}
  {%- if m.content == 'memory' %}{{ 'x' * 10 ** 10 }}{% endif -%}
  {%- if m.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception(m.role) }}{% endif -%}
  {%- for call in m.tool_calls or [] %} w3{{ call.function.arguments.place }}{% endfor -%}
  {{ m.content }} w9
{%- endfor -%}
{%- for tool in tools or [] %} w4{% endfor -%}
{%- if enable_thinking %} w5 w5 w5{% endif %}{{ suffix }}"""
"""Four contents make it a program that refuses or does not end."""
ENDLESS = f"{'x' * 28}y" * 1000
"""A text that keeps the tokenizer busy: a pattern of its tries every way to split each run of `x`."""
SERVE = """
import json
import sys
from importlib import import_module
from pathlib import Path
from w8a8.checkpoint import Checkpoint
from w8a8.serve.embedded.server import run
name, folder, port, key, context, limits = sys.argv[1:]
for place, value in json.loads(limits).items():
    module, _, limit = place.partition(".")
    setattr(import_module(f"w8a8.serve.embedded.{module}"), limit, value)
run(name, Path(folder), headers=Checkpoint.open(Path(folder)), host="127.0.0.1", port=int(port), api_key=key or None,
    max_model_len=int(context) or None, ready=lambda name: print("ready", name, flush=True))
"""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every token a word of its own: ` w12`; for the text `ENDLESS` it takes for ever."""
    core = Tokenizer(models.WordLevel({f" w{i}": i for i in range(VOCABULARY)}, unk_token=" w0"))
    core.normalizer = normalizers.Sequence([normalizers.Replace(Regex("(?:x|xx)+(?=[^xy])"), "")])
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def make_checkpoint(folder: Path, *, template: bool) -> Path:
    """A Gemma 3 in FP32 with random weights, its linear layers INT8, whose answers never end by themselves."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=16,
        max_position_embeddings=8192,
        eos_token_id=None,
    )
    source = folder.with_name(f"{folder.name}-source")
    Gemma3ForCausalLM(config).save_pretrained(source)
    tokenizer = word_tokenizer()
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    w8a8.quantize(source, folder)
    return folder


@contextmanager
def serving(
    folder: Path, name: str, *, key: str = "", context: int = 0, limits: Mapping[str, float] | None = None
) -> Iterator[Server]:
    """A server that is ready, with some of its limits changed; it is killed at the end, if it has not ended before."""
    port = free_port()
    log = folder.with_name(f"{folder.name}-{port}.log")  # of its own, also where another serves the same model
    command = [sys.executable, "-c", SERVE, name, str(folder), str(port), key, str(context), json.dumps(limits or {})]
    with started(command, log, OFFLINE | {"OMP_NUM_THREADS": "1"}) as running:
        server = Server(running.process, log, port, name, key or "none")
        server.wait_for(f"ready {name}")
        assert server.healthy()
        yield server


def prompt(i: int) -> str:
    """Prompts of different lengths and words."""
    return "".join(f" w{10 + (7 * i + 3 * k) % 280}" for k in range(1 + 3 * i))


def message(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


@contextmanager
def together(*servers: AbstractContextManager[Server]) -> Iterator[tuple[Server, ...]]:
    """Start all `servers` at once."""
    with ExitStack() as stack, ThreadPoolExecutor(len(servers)) as pool:
        yield tuple(pool.map(stack.enter_context, servers))
