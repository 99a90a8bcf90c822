"""Record a small model of an architecture for the tests: `python scripts/record_architecture.py MODEL_TYPE`.

Builds a decoder of two layers with transformers, without weights, and writes

- `tests/plan/names/MODEL_TYPE.json`: every tensor with its shape, what module it belongs to, and whether it is to be
  quantized: the weight of every linear layer inside a decoder layer. Correct by hand what should stay in BF16.
- with `--vllm PYTHON` (that of an environment with vLLM) its entry in `tests/memory/vllm.json`: its config, and what
  vLLM's own classes allocate for it on one GPU and on two (or on as many as `--gpus` says).

Options of the form `--set KEY=JSON` go into the config. With `--sizes-only` the names go to
`tests/memory/tensors.json`, as transformers saves them (experts one by one where it does), and `--int8` records it with
its linear layers in INT8, too.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

TESTS = Path(__file__).parent.parent / "tests"
SIZER = TESTS / "engines" / "vllm_sizes.py"
CONTEXT = 64
SIZES: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}

INT8: Mapping[str, Any] = json.loads((TESTS / "memory" / "int8.json").read_text())
"""The `quantization_config` of a result in compressed-tensors, and what it leaves alone, as patterns."""


def build(model_type: str, settings: Mapping[str, Any]) -> Any:
    """A small model on the meta device."""
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **settings})
        made = transformers.AutoModelForCausalLM.from_config(config)
    made.config.architectures = [type(made).__name__]
    return made


def tensors(made: Any) -> dict[str, Any]:
    """What it would save: every tensor by name, with its shape, its kind, and whether to quantize it."""
    tied = set(made.all_tied_weights_keys)
    state = {name: value for name, value in made.state_dict().items() if name not in tied}
    names = {id(value): name for name, value in state.items()}
    found = {}
    for name, value in revert_weight_conversion(made, state).items():
        kind = _kind(made, name, names.get(id(value), name))
        found[name] = {"shape": list(value.shape), "kind": kind, "quantize": kind == "linear" and ".layers." in name}
    return dict(sorted(found.items()))


def _kind(made: nn.Module, name: str, in_memory: str) -> str:
    """The kind of the module that a tensor belongs to; experts are linear layers, however they are stored."""
    if ".experts." in in_memory:
        return "other" if name.endswith("bias") else "linear"
    if not name.endswith(".weight"):
        return "other"
    kinds = {nn.Linear: "linear", nn.Embedding: "embedding", nn.Conv1d: "conv", nn.Conv2d: "conv"}
    module = made.get_submodule(in_memory.rpartition(".")[0])
    found = next((kind for of, kind in kinds.items() if isinstance(module, of)), None)
    return found or ("norm" if "Norm" in type(module).__name__ else "other")


def allocated(config: Mapping[str, Any], python: str, gpus: Sequence[int]) -> dict[str, Any]:
    """What vLLM allocates for it, by the number of GPUs."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for count in gpus:
            command = [python, str(SIZER), str(count), json.dumps({"context": CONTEXT}), folder]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[str(count)] = json.loads(run.stdout.splitlines()[-1])[folder]
    return found


def pretty(values: Any) -> str:
    """JSON with one entry of an object a line, but lists and objects of sizes on one."""
    text = json.dumps(values, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r",\s+", ", ", m[1]) + "]", text)
    return re.sub(r'\{\s+("weights"[^{}]*?)\s+\}', lambda m: "{" + re.sub(r",\s+", ", ", m[1]) + "}", text)


def main() -> None:
    """Write what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_type")
    parser.add_argument("--vllm", metavar="PYTHON", help="record what vLLM allocates, too")
    parser.add_argument("--set", metavar="KEY=JSON", action="append", default=[], help="an entry of the config")
    parser.add_argument("--gpus", metavar="N", type=int, nargs="+", default=[1, 2], help="how many GPUs share it")
    parser.add_argument("--sizes-only", action="store_true", help="record for tests/memory alone")
    parser.add_argument("--int8", action="store_true", help="with --sizes-only: record it in INT8, too")
    options = parser.parse_args()
    settings = {key: json.loads(value) for key, _, value in (entry.partition("=") for entry in options.set)}
    # 1) The model and its config.
    made = build(options.model_type, settings)
    config = made.config.to_dict()
    # 2) Its tensors' names.
    if options.sizes_only:
        path = TESTS / "memory" / "tensors.json"
        shapes = {name: entry["shape"] for name, entry in tensors(made).items()}
        path.write_text(lines({**json.loads(path.read_text()), options.model_type: shapes}))
    else:
        head = {key: config[key] for key in ("model_type", "architectures")}
        path = TESTS / "plan" / "names" / f"{options.model_type}.json"
        path.write_text(json.dumps({"config": head, "tensors": tensors(made)}, separators=(",", ":")))
    print(path)
    # 3) What vLLM allocates.
    if options.vllm:
        sizes = TESTS / "memory" / "vllm.json"
        config = json.loads(made.config.to_json_string())
        entry = {"config": config, "vllm": allocated(config, options.vllm, options.gpus)}
        if options.int8:
            entry["int8"] = allocated({**config, "quantization_config": INT8}, options.vllm, options.gpus)
        recorded = json.loads(sizes.read_text())
        recorded["families"][options.model_type] = entry
        sizes.write_text(pretty(recorded) + "\n")
        print(sizes)


def lines(values: Mapping[str, Any]) -> str:
    """JSON with one entry of an object a line."""
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(values.items())) + "\n}\n"


if __name__ == "__main__":
    main()
