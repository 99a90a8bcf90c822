"""Train a small language model and give it outlier channels: `python scripts/train_small.py KIND OUT --gsm8k FOLDER`.

Recipes are for models whose activations have outliers, and published models of many architectures that have them do
not fit into a test. So here are small ones, Llama or Qwen3 in shape: some million parameters, a tokenizer of their own,
trained from nothing for some minutes on GSM8K's training questions and answers. That much is real: the weights are
what gradient descent made of them, and the model predicts text like the one it has seen far better than chance.

The outliers are artificial. Training on a small scale makes none, so a few channels are made loud afterwards, without
changing what the model computes: a norm's weight for a channel is multiplied, and the columns that read it are divided;
likewise up_proj's rows and down_proj's columns, v_proj's rows and o_proj's columns. It is by such scales that recipes
undo outliers, so what a recipe gains here says that it works on an architecture, not how much it will gain on a real
model of it. Factors are powers of two: the scaled model computes, to the bit, what it computed before.

OUT is a BF16 checkpoint and must not exist.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

KINDS = ("llama", "qwen3")
BOS = "<s>"
SEQUENCES, LENGTH = 8, 256
"""What a step of training sees: so many sequences of so many tokens."""
RATE, WARM_UP = 3e-3, 20
"""The learning rate at its highest, after so many steps; from there it falls to nothing."""
SHOWN = 20
"""A loss is the mean of so many steps."""
LOUD = 1 / 50
"""The share of channels that become loud."""
FACTORS = (16.0, 32.0, 64.0)
"""How many times as loud."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is; there are as many heads of 32 channels as it takes, two to a key-value head."""

    hidden: int = 192
    layers: int = 4
    vocabulary: int = 2048


def read(folder: Path) -> list[str]:
    """GSM8K's training questions, each with its answer, of `train.jsonl` in `folder`."""
    rows = map(json.loads, (folder / "train.jsonl").read_text(encoding="utf-8").splitlines())
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens that puts `BOS` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS)


def train(kind: str, size: Size, tokenizer: Any, texts: Sequence[str], steps: int) -> Any:
    """A model of `kind`, trained in FP32 for `steps` steps on `texts` and rounded to BF16; losses go to stderr."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(_config(kind, size, tokenizer), dtype=torch.float32)
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    for step in range(steps):
        adam.param_groups[0]["lr"] = RATE * min((step + 1) / WARM_UP, 1 - step / steps)
        starts = torch.randint(len(ids) - LENGTH, (SEQUENCES, 1))
        batch = ids[starts + torch.arange(LENGTH)]
        loss = model(batch, labels=batch).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        losses.append(loss.item())
        if (step + 1) % SHOWN == 0 or step + 1 == steps:
            mean = sum(losses[-SHOWN:]) / len(losses[-SHOWN:])
            print(f"step {step + 1} of {steps}: loss {mean:.3f} nats per token", file=sys.stderr)
    return model.to(torch.bfloat16).eval()


def _config(kind: str, size: Size, tokenizer: Any) -> Any:
    return AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 64,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.bos_token_id,  # a text ends where the next begins
    )


def provoke_outliers(model: Any) -> None:
    """Make some channels of every linear layer's input loud, in place; the model computes what it did."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            mlp.up_proj: (mlp.down_proj,),
        }
        for producer, consumers in readers.items():
            factors = _factors(len(producer.weight), generator)
            _multiply(producer, factors)
            for consumer in consumers:
                consumer.weight.data /= factors
        factors = _factors(len(attention.v_proj.weight), generator)
        _multiply(attention.v_proj, factors)
        heads = factors.view(-1, 1, attention.head_dim).expand(-1, attention.num_key_value_groups, -1)
        attention.o_proj.weight.data /= heads.reshape(
            -1
        )  # the query heads that share a key-value head read the same values


def _factors(channels: int, generator: torch.Generator) -> torch.Tensor:
    """What each of `channels` is multiplied by: most by 1."""
    loud = torch.randperm(channels, generator=generator)[: max(1, round(LOUD * channels))]
    factors = torch.ones(channels, dtype=torch.bfloat16)
    factors[loud] = torch.tensor(FACTORS, dtype=torch.bfloat16)[torch.randint(3, loud.shape, generator=generator)]
    return factors


def _multiply(producer: Any, factors: torch.Tensor) -> None:
    """Multiply what a norm (weight [out]) or a linear layer (weight [out, in]) gives by `factors` [out]."""
    producer.weight.data.mul_(factors if producer.weight.ndim == 1 else factors[:, None])


def main() -> None:
    """Take what to do from the command line."""
    parser = argparse.ArgumentParser(description="Train a small model on GSM8K and give it outlier channels.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} exists; remove it or choose another folder")
    size, texts = Size(), read(given.gsm8k)
    tokenizer = train_tokenizer(texts, size.vocabulary)
    model = train(given.kind, size, tokenizer, texts, given.steps)
    provoke_outliers(model)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    print(given.out)


if __name__ == "__main__":
    main()
