"""Run by a Python that has vLLM: reads lines of JSON, `{"folder": PATH, "prompts": [[token]]}`, and answers each.

An answer has the `scores` of the prompts as stock vLLM gives them on this CPU in `dtype`, or an `error`; `known` says
whether vLLM has such a model at all. Each folder gets a process of its own, forked from this one, which has imported
all: starting vLLM takes longer than any of the models. They compute in FP32 where they can, so that nothing but INT8
tells them from the exact reference.
"""

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_LOGGING_LEVEL="CRITICAL",
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_DIST_IDENT="x",
    VLLM_NO_USAGE_STATS="1",
    TORCHDYNAMO_DISABLE="1",  # compiling takes longer than what is compiled
)
RESULT = "RESULT "
PATIENCE = 300
"""Seconds that a model may take."""
IMPORTED = ("vllm.v1.engine.llm_engine", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "plain_experts")
"""What every model needs."""
UNKNOWN = ("does not recognize this architecture", "is not supported anymore", "are not supported for now")
"""What vLLM says of models that it has not."""


def scores(folder: Path, prompts: Sequence[Sequence[int]], dtype: str) -> list[list[float]]:
    """The log-probability of every token but the first of each prompt, given those before it."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=2**26,
        enable_prefix_caching=False,
        compilation_config={"custom_ops": ["none"]},  # its rotary one is wrong for DeepSeek's attention on CPUs
        language_model_only=True,  # of a model with towers
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": [*p]} for p in prompts], sampling, use_tqdm=False)
    return [
        [position[token].logprob for token, position in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def tried(folder: Path, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The scores in FP32, or in BF16 where vLLM has no FP32 for a model; or why there are none."""
    error = ""
    for dtype in ("float32", "bfloat16"):
        try:
            return {"dtype": dtype, "scores": scores(folder, prompts, dtype)}
        except Exception as failed:  # noqa: BLE001 - it is what the table says
            traceback.print_exc()
            error = f"{type(failed).__name__}: {str(failed) or traceback.extract_tb(failed.__traceback__)[-1].line}"
        if "BF16" not in error and "bfloat16" not in error:
            break
    return {"dtype": dtype, "error": error, "known": not any(words in error for words in UNKNOWN)}


def answer(folder: Path, prompts: Sequence[Sequence[int]]) -> None:
    """Try a folder in a process of its own, and print what it gives."""
    if not (child := os.fork()):
        signal.alarm(PATIENCE)  # ends the process
        print(RESULT + json.dumps(tried(folder, prompts)), flush=True)
        os._exit(0)
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        why = f"nothing for {PATIENCE} s" if status == -signal.SIGALRM else f"its process ended with {status}"
        print(RESULT + json.dumps({"error": why}), flush=True)


def main() -> None:
    """Answer until the input ends."""
    import torch
    from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
    from vllm.model_executor.models import registry
    from vllm.multimodal.processing import BaseProcessingInfo

    for name in IMPORTED:
        import_module(name)
    import_module("plain_experts").install()  # beside this file
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    QuarkConfig.get_supported_act_dtypes = lambda self: dtypes  # FP32 is only not listed: the kernel has it
    registry._run_in_subprocess = lambda inspect: inspect()  # a process for each class costs more than its model
    BaseProcessingInfo.supported_mm_limits = {}  # text alone: else vLLM asks a processor what to allow none of
    gc.freeze()  # else every process looks through all that is imported
    for line in sys.stdin:
        asked = json.loads(line)
        answer(Path(asked["folder"]), asked["prompts"])


if __name__ == "__main__":
    main()
