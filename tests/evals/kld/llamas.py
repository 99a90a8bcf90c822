"""Small Llamas that read characters, texts for them, and their divergence."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from w8a8.evals.kld.run import KldResult, prepare, run
from w8a8.texts.files import Text

PROSE = """\
In the valley the harvest had been gathered early that year, and the carts stood empty behind the mill. The miller, \
who was seldom seen without his pipe, had gone down to the river to look at the wheel, which had begun to groan in the \
night. He found nothing wrong with it but its age, and he said so to his daughter when he came home for supper."""


WORDS = ["<s>", *"\n abcdefghijklmnopqrstuvwxyz.,"]
LETTERS = Text("letters", ("the wheel had begun to groan, and nothing was wrong with it but its age.", "so he said."))


def make_llama(folder: Path, *, seed: int = 0, bos: bool = True, words: list[str] = WORDS, **config: Any) -> Path:
    """A small random Llama in float32 that reads characters."""
    set_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": 512, "initializer_range": 0.5}
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **sizes, **config}))
    model.save_pretrained(folder)
    characters = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token=" "))
    if bos:
        characters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=characters, bos_token="<s>").save_pretrained(folder)
    return folder


def measure(reference: Path, candidate: Path, text: Text = LETTERS, **options: Any) -> KldResult:
    return run(prepare(reference, candidate, text, **options))
