"""What the commands read, and how they read it: a healthy folder each, and the functions behind the commands."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tests.checkpoints import llama_tensors, write_checkpoint
from tests.memory.reference import RECORDED
from tests.named import Family
from tests.publish import results
from w8a8.checkpoint import Checkpoint, read_header
from w8a8.checkpoint.header import write_header
from w8a8.checkpoint.hub import HubFolder
from w8a8.checkpoint.reader import INDEX
from w8a8.checkpoint.remote import RemoteFile, called, lay_out
from w8a8.checkpoint.source import refused
from w8a8.evals.gsm8k import questions
from w8a8.evals.gsm8k.compare import compare
from w8a8.evals.gsm8k.journal import OutcomeJournal, open_journal
from w8a8.evals.gsm8k.results import read as read_result
from w8a8.execute.shard import ShardRecord
from w8a8.execute.staging import Job as StagingJob
from w8a8.inspection import inspect
from w8a8.machine import describe
from w8a8.memory import fit, ram_needed
from w8a8.publish.card.accuracy import accuracy
from w8a8.publish.card.frontmatter import entries_but, metadata_of
from w8a8.publish.card.text import kept, read_text
from w8a8.publish.card.write import make
from w8a8.publish.made import Made
from w8a8.publish.results import Measured, Results, read_gsm8k, read_kld
from w8a8.quantization import Options, dry_run, quantize
from w8a8.serve.calling import can_chat
from w8a8.storage.journal import Journal
from w8a8.texts import samples
from w8a8.verification.job import prepare
from w8a8.verification.structure import bookkeeping_problems, exclude_warnings, structure_problems

FAMILIES = ("gemma3", "qwen3_5", "mistral3", "phi3")
README = """---
license: apache-2.0
language:
- no
tags: [a, b]
extra: {x: 1}
---
# A card
<!-- yours: begin intro -->
mine
<!-- yours: end intro -->
"""


@dataclass(frozen=True)
class Target:
    """A healthy `folder`, the `files` in it to damage, and what reads it; `share` of all inputs go to it."""

    name: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], object]
    share: float


def targets(root: Path) -> Iterator[Target]:
    """Lay out every target below `root`."""
    config = {**RECORDED["families"]["llama"]["config"], "tie_word_embeddings": False}
    llama = write_checkpoint(root / "llama", llama_tensors(layers=1), shards=2, config=config)
    (llama / "tokenizer_config.json").write_text('{"chat_template": "x", "model_max_length": 1e30}')
    (llama / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]')
    (llama / "1_Pooling").mkdir()
    (llama / "1_Pooling" / "config.json").write_text("{}")
    first = "model-00001-of-00002.safetensors"
    own = ("config.json", "config.json", INDEX, first, "tokenizer_config.json", "modules.json", "1_Pooling/config.json")
    yield Target("checkpoint", llama, own, _checkpoint, 8)
    yield Target("remote", llama, ("config.json", INDEX, first), _remote, 8)
    yield Target("header", llama, (first,), lambda folder: read_header(folder / first), 25)
    for name in FAMILIES:
        yield Target(name, _sparse(root / name, name), ("config.json",), _memory, 2)
    for spelling in ("quark", "compressed-tensors"):
        out = root / spelling
        quantize(llama, out, Options(format=spelling))
        made = ("config.json", "w8a8.json", "w8a8.json", INDEX, first)
        yield Target(spelling, out, made, lambda folder: _made(folder, llama), 5)
    (root / "results").mkdir()
    for file, result in {"base": results.gsm8k("base", [True, False] * 3), "kld": results.kld()}.items():
        results.write(root / "results" / f"{file}.json", result)
    shutil.copy(root / "results" / "base.json", root / "results" / "quant.json")
    yield Target("results", root / "results", ("quant.json", "kld.json"), _results, 15)
    card = shutil.copytree(root / "quark", root / "card")
    make_card(card, root / "results")
    (card / "README.md").write_text(README)
    yield Target("card", card, ("README.md", "w8a8.json", "config.json"), lambda f: make_card(f, root / "results"), 0.3)
    yield Target("readme", card, ("README.md",), lambda f: _readme(f / "README.md"), 8)
    yield from _others(root / "others")


def _others(folder: Path) -> Iterator[Target]:
    folder.mkdir()
    rows: list[Any] = [
        {"text": "one"},
        {"question": "1 + 1?", "answer": "#### 2"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ]
    for name, lines in {"text.jsonl": rows, "train.jsonl": rows[1:2] * 4, "test.jsonl": rows[1:2] * 4}.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "text.txt").write_text("A text.\n" * 10)
    line = {"index": 1, "answer": "2", "finish_reason": None, "prompt_tokens": 1, "completion_tokens": 1, "error": None}
    with _gsm8k_journal(folder) as opened:
        opened.journal.append({**line, "seconds": 1.5})
    staging = Journal(folder / "staging.jsonl", StagingJob, ShardRecord)
    staging.append(StagingJob("1", "quark", "rtn", "f" * 64, {}))
    staging.append(ShardRecord("a.safetensors", 10, "a" * 64, "b" * 64))
    yield Target("texts", folder, ("text.jsonl", "text.txt"), _texts, 10)
    yield Target("questions", folder, ("train.jsonl", "test.jsonl"), lambda f: questions.load(f, shots=2), 6)
    yield Target("journal", folder, ("gsm8k.jsonl", "staging.jsonl"), _journals, 8)


def _sparse(folder: Path, family: str) -> Path:
    """A family's small model of four layers, with its whole config, whose data are a hole in the file."""
    rows, end = [], 0
    for name, tensor in Family.load(family).checkpoint.tensors.items():
        if re.search(r"layers\.([4-9]|\d\d)", name):
            continue
        rows.append((name, tensor.dtype, tensor.shape, end, end + tensor.nbytes))
        end += tensor.nbytes
    folder.mkdir()
    header = write_header(rows, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    (folder / "config.json").write_text(json.dumps(RECORDED["families"][family]["config"]))
    return folder


def _checkpoint(folder: Path) -> None:
    Checkpoint.open(folder)
    can_chat(str(folder))
    inspect(folder)
    dry_run(folder).to_dict()


def _memory(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    fit(opened, describe("4x24GiB:gfx1100"), context=2048).to_dict()
    ram_needed(opened, 512)


def _made(folder: Path, source: Path) -> None:
    job = prepare(folder, source)
    for find in (structure_problems, bookkeeping_problems, exclude_warnings):
        list(islice(find(job), 1000))
    list(Made.open(folder).problems())


def _results(folder: Path) -> None:
    base = read_result(folder / "base.json")
    if (folder / "kld.json").exists():
        accuracy(Measured(None, None, None, read_kld(folder / "kld.json")))
    quant = read_gsm8k(folder / "quant.json")
    accuracy(Measured(quant, quant, compare(base, read_result(folder / "quant.json")), None))


def _readme(path: Path) -> None:
    text = read_text(path)
    metadata_of(text)
    entries_but(text, ("license", "tags"))
    kept(text)


def make_card(folder: Path, measured: Path) -> None:
    """Compose a card as `w8a8 card` does."""
    make(folder, results=Results(measured / "base.json", measured / "quant.json", measured / "kld.json"))


def _texts(folder: Path) -> None:
    samples.load(str(folder / "text.jsonl"))
    samples.load(str(folder / "text.txt"))


def _journals(folder: Path) -> None:
    Journal(folder / "staging.jsonl", StagingJob, ShardRecord).read()
    with _gsm8k_journal(folder):
        pass


def _gsm8k_journal(folder: Path) -> AbstractContextManager[OutcomeJournal]:
    return open_journal(folder / "gsm8k.jsonl", asking={"shots": 8}, started="now", questions=9, restart=False)


@dataclass(frozen=True)
class _Served(HubFolder):
    """The files of a folder, as a server would send their beginnings."""

    def start(self, name: str, count: int, begin: int = 0) -> tuple[bytes, int]:
        with (Path(self.version) / name).open("rb") as file:
            file.seek(begin)
            return file.read(count), os.fstat(file.fileno()).st_size


def _remote(folder: Path) -> None:
    laid_out = folder.parent / "laid_out"
    shutil.rmtree(laid_out, ignore_errors=True)
    laid_out.mkdir()
    files = {path.name: RemoteFile(path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file()}
    files = {name: file for name, file in files.items() if file.size < 1 << 30}
    try:
        with called("org/name", laid_out):
            lay_out(_Served("name", "org/name", str(folder), files), laid_out)
            Checkpoint.open(laid_out)
    except OSError as error:
        raise refused("org/name", error) from error
