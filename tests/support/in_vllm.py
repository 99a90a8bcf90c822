"""Run by a Python that has vLLM: `in_vllm.py FOLDER...`, a line of JSON for each as it is done.

A line has the `scores` of the prompts in the folder's `prompts.json`, as stock vLLM gives them on this CPU in `dtype`,
or `error`. The models run one after another in one process: starting vLLM takes longer than any of them. They compute
in FP32 where they can, so that nothing but INT8 tells them from the exact reference.
"""

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_LOGGING_LEVEL="CRITICAL",
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_DIST_IDENT="x",
)
RESULT = "RESULT "


def scores(folder: str, prompts: Sequence[Sequence[int]], dtype: str) -> list[list[float]]:
    """The log-probability of every token but the first of each prompt, given those before it."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=2**26,
        enable_prefix_caching=False,
        **_without_towers(folder),
    )
    try:
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        answers = engine.generate([{"prompt_token_ids": [*p]} for p in prompts], sampling, use_tqdm=False)
        return [
            [position[token].logprob for token, position in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    finally:
        engine.llm_engine.engine_core.shutdown()


def tried(folder: str) -> dict[str, Any]:
    """The scores in FP32, or in BF16 where vLLM has no FP32 for a model; or why there are none."""
    prompts = json.loads((Path(folder) / "prompts.json").read_text())
    error = ""
    for dtype in ("float32", "bfloat16"):
        try:
            return {"dtype": dtype, "scores": scores(folder, prompts, dtype)}
        except Exception as failed:  # noqa: BLE001 - it is what the table says
            error = error or f"{type(failed).__name__}: {failed}"
        if "BF16" not in error and "bfloat16" not in error:
            break
    return {"error": error}


def _without_towers(folder: str) -> Mapping[str, Any]:
    """What lets a model with towers run as a language model alone, without a processor."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return {"language_model_only": True} if {"vision_config", "audio_config"} & set(config) else {}


def main() -> None:
    """Try the folders."""
    import torch
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
    from vllm.model_executor.models import registry

    import_module("plain_experts").install()  # beside this file
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    QuarkConfig.get_supported_act_dtypes = lambda self: dtypes  # FP32 is only not listed: the kernel has it
    registry._run_in_subprocess = lambda inspect: inspect()  # a process for each class costs more than its model
    for folder in sys.argv[1:]:
        print(RESULT + json.dumps(tried(folder)), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
