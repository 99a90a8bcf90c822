"""Engines that run in a process of their own and are told what to do by lines of JSON; each in its own environment.

A driver is given the model's path and how many threads to use. It reads lines with `prompts`, a list of texts, and
`tokens`, the number that follows each; it answers all prompts at once, greedily, and writes a line with `seconds`,
`prompt_tokens` and `completion_tokens`.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from w8a8.bench.environment import TORCH, built
from w8a8.bench.process import last_line
from w8a8.errors import EngineError

_MAIN = """
import json, sys, time

def main(prompts_read):
    print(flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        read, written = prompts_read(asked["prompts"], asked["tokens"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "prompt_tokens": read, "completion_tokens": written}), flush=True)
"""

_TORCHAO = """
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, quantization_config=TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
)

def generate(prompts, tokens):
    given = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return int(given["attention_mask"].sum()), tokens * len(prompts)

main(generate)
"""

_LLAMA_CPP = """
import ctypes, os
import llama_cpp as lib
import numpy as np

lib.llama_backend_init()

source, threads = sys.argv[1], int(sys.argv[2])
target = sys.argv[3]
if not os.path.exists(target):
    how = lib.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = lib.LLAMA_FTYPE_MOSTLY_Q8_0, True, threads
    if lib.llama_model_quantize(source.encode(), (target + ".part").encode(), ctypes.byref(how)):
        sys.exit("llama.cpp cannot quantize the file")
    os.rename(target + ".part", target)

SEQUENCES, CONTEXT, BATCH = 16, 1024, 2048
model = lib.llama_model_load_from_file(target.encode(), lib.llama_model_default_params())
how = lib.llama_context_default_params()
how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = SEQUENCES * CONTEXT, BATCH, 512, SEQUENCES
how.n_threads = how.n_threads_batch = threads
context, vocabulary = lib.llama_init_from_model(model, how), lib.llama_model_get_vocab(model)
size, batch = lib.llama_vocab_n_tokens(vocabulary), lib.llama_batch_init(BATCH, 0, 1)

def tokenize(text):
    data, ids = text.encode(), (lib.llama_token * CONTEXT)()
    return ids[: lib.llama_tokenize(vocabulary, data, len(data), ids, CONTEXT, True, False)]

def decode(entries):
    # Entries are (token, position, sequence, whether its logits are wanted): what follows each that wants them.
    following = {}
    for start in range(0, len(entries), BATCH):
        part = entries[start : start + BATCH]
        batch.n_tokens = len(part)
        for i, (token, position, sequence, wanted) in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if lib.llama_decode(context, batch):
            raise SystemExit("llama.cpp cannot decode the batch")
        for i, (_, _, sequence, wanted) in enumerate(part):
            if wanted:
                logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), shape=(size,))
                following[sequence] = int(logits.argmax())
    return following

def generate(prompts, tokens):
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    given = [tokenize(text) for text in prompts]
    found = decode([(t, p, s, p == len(ids) - 1) for s, ids in enumerate(given) for p, t in enumerate(ids)])
    for step in range(tokens - 1):
        found = decode([(token, len(given[s]) + step, s, True) for s, token in found.items()])
    return sum(map(len, given)), tokens * len(prompts)

main(generate)
"""


@dataclass(frozen=True, slots=True)
class Driver:
    """An engine: `key` names its environment's folder, `steps` are the packages that are installed in turn."""

    key: str
    name: str
    steps: tuple[tuple[str, ...], ...]
    script: str

    def command(self, folder: Path, *arguments: str | Path) -> list[str]:
        """Return the command that starts it, after building its environment if needed. Raises W8A8Error."""
        home = folder / self.key
        python = built(home, *self.steps)
        script = home / "drive.py"
        script.write_text(_MAIN + self.script, encoding="utf-8")
        return [str(python), str(script), *map(str, arguments)]


TORCHAO = Driver(
    "torchao", "torchao 0.18, INT8 dynamic", ((TORCH,), (TORCH, "torchao==0.18.0", "transformers==5.23.0")), _TORCHAO
)
LLAMA_CPP = Driver("llama.cpp", "llama.cpp, Q8_0", (("llama-cpp-python==0.3.36", "numpy>=2"),), _LLAMA_CPP)


class Driven:
    """A driver that runs."""

    def __init__(self, process: "subprocess.Popen[str]", log: IO[str]) -> None:
        """Wait until its model is loaded. Raises EngineError."""
        self._process, self._log = process, log
        self._line()

    def ask(self, prompts: Sequence[str], tokens: int) -> Mapping[str, Any]:
        """Let it answer. Raises EngineError."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._process.stdin, flush=True)
        found: Mapping[str, Any] = json.loads(self._line())
        return found

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise EngineError(last_line(self._log.read()) or f"ended with exit code {self._process.wait()}")
        return line


@contextmanager
def driven(command: Sequence[str]) -> Iterator[Driven]:
    """Start a driver, and end it. Raises EngineError with its last words."""
    with TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace"
        )
        try:
            yield Driven(process, log)
        finally:
            process.kill()
            process.communicate()
