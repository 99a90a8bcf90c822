"""Tasks of every kind whose data are files here, and a small model that reads characters."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

ANIMALS = ["a cat", "the old dog", "no bird", "one horse", "a small frog", "two geese"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tasks(folder: Path) -> Path:
    """`pets` chooses, `echoes` answers, `last` completes, `prose` is read; `zoo` is a group."""
    folder.mkdir()
    rows = [
        {"question": f"who is {i}?", "choices": ANIMALS[i % 4 : i % 4 + 3], "gold": i % 3, "answer": ANIMALS[i % 6]}
        for i in range(6)
    ]
    for split, part in (("train", rows[:2]), ("test", rows[2:])):
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}},
        "training_split": "train",
        "test_split": "test",
        "metadata": {"version": 1.5},
        "doc_to_text": "{{question}} it is",
    }
    mean: dict[str, Any] = {"aggregation": "mean", "higher_is_better": True}
    choose: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }
    answer = {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n", "q"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    complete = {"output_type": "loglikelihood", "doc_to_target": "answer", "metric_list": [{"metric": "acc", **mean}]}
    read = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{answer}} " * 9,
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    tasks: dict[str, Any] = {"pets": choose, "more_pets": choose, "echoes": answer, "last": complete, "prose": read}
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    group = {"group": "zoo", "task": ["pets", "more_pets"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "zoo.yaml").write_text(json.dumps({**group, "metadata": {"version": 2}}))
    (folder / "far.yaml").write_text(json.dumps({"task": "far", **common, **answer, "dataset_path": "no/body"}))
    unsafe = {"task": "programs", **common, **answer, "unsafe_code": True}
    (folder / "programs.yaml").write_text(json.dumps(unsafe))
    return folder


def make_model(folder: Path, seed: int = 0, context: int = 256) -> Path:
    """A small random Llama in float32 that reads characters, with a beginning, an end and a chat template."""
    words = ["<s>", "</s>", *"\n abcdefghijklmnopqrstuvwxyz0123456789.,:?"]
    set_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"vocab_size": len(words), "max_position_embeddings": context, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**sizes, **more, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    characters = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"."), "isolated")
    characters.decoder = decoders.Fuse()
    characters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=characters, bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder
