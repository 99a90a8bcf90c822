"""Engines that run in a process of their own and are told what to do by lines of JSON; each in its own environment.

A driver is given the model's path and how many threads to use, and writes a line when the model is loaded. That line is
the address of a server, or empty. A driver that is no server reads lines with `prompts`, a list of texts, and `tokens`,
the number that follows each; it answers all prompts at once, greedily, and writes a line with `seconds`,
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

_TORCHAO = (
    _MAIN
    + """
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
)

_LLAMA_CPP = """
import sys
import gguf, numpy as np, xllamacpp

source, target, (threads, sequences, context) = *sys.argv[1:3], map(int, sys.argv[3:])
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
for name, field in reader.fields.items():
    if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
for tensor in reader.tensors:
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    kind = F32 if tensor.tensor_type == F32 else Q8_0
    writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

how = xllamacpp.CommonParams()
how.model.path, how.n_ctx, how.n_parallel, how.n_threads_http = target, sequences * context, sequences, sequences
how.cpuparams.n_threads = how.cpuparams_batch.n_threads = threads
how.cache_prompt, how.endpoint_slots = False, False
server = xllamacpp.Server(how)
print(server.listening_address, flush=True)
sys.stdin.read()
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
        script.write_text(self.script, encoding="utf-8")
        return [str(python), str(script), *map(str, arguments)]


TORCHAO = Driver(
    "torchao", "torchao 0.18, INT8 dynamic", ((TORCH,), (TORCH, "torchao==0.18.0", "transformers==5.23.0")), _TORCHAO
)
LLAMA_CPP = Driver("llama.cpp", "llama.cpp, Q8_0", (("xllamacpp==2026.10.11549", "gguf==0.19.0"),), _LLAMA_CPP)


class Driven:
    """A driver that runs."""

    def __init__(self, process: "subprocess.Popen[str]", log: IO[str]) -> None:
        """Wait until its model is loaded; `address` is its server's, or empty. Raises EngineError."""
        self._process, self._log = process, log
        self.address = self._line().strip()

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
