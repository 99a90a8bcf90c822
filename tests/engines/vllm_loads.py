"""Run by a Python that has vLLM: `vllm_loads.py FOLDER...`, JSON out: what stock vLLM misses when it loads each.

Each folder is loaded in a process of its own by vLLM's model class and loader, on the CPU, to the point where it would
answer; "missing" are the parameters that it built and found nothing for, "int8" how many are INT8, "error" why it
failed.
"""

import json
import multiprocessing
import os
import sys
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(VLLM_LOGGING_LEVEL="CRITICAL", HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_DIST_IDENT="x")
NOT_STORED = ("zero_point", ".k_scale", ".v_scale", ".q_scale", ".prob_scale")


def loaded(folder: str) -> dict[str, Any]:
    """What vLLM misses in a folder."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(
        model=folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, dtype="bfloat16"
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), TemporaryDirectory() as meeting:
        parallel_state.init_distributed_environment(1, 0, f"file://{meeting}/place", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        with set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=config)
        parameters = dict(model.named_parameters())
        weights = DefaultModelLoader(config.load_config).get_all_weights(config.model_config, model)
        found = model.load_weights(weights)
        missing = sorted(name for name in parameters.keys() - found if not name.endswith(NOT_STORED))
        int8 = sum(p.dtype == torch.int8 for name, p in parameters.items() if name.endswith(".weight"))
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return {"missing": missing, "int8": int8, "error": None}


def tried(folder: str) -> dict[str, Any]:
    """What vLLM misses, or why it failed."""
    try:
        return loaded(folder)
    except Exception as error:  # noqa: BLE001 - it is what the test asks for
        return {"missing": [], "int8": 0, "error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(dict(zip(sys.argv[1:], pool.map(tried, sys.argv[1:], chunksize=1), strict=True))))
