"""What vLLM itself would allocate: run by a Python that has vLLM, `vllm_sizes.py TP OPTIONS.json FOLDER...`, JSON out.

Builds each folder's model with vLLM's own classes on the meta device, as rank 0 of TP ranks that exist in name only
(torch's "fake" process group), so that the real shapes of a 31B can be asked for anywhere. No weight is read. Blocks
are sized as on a GPU: 16 tokens, batches of 2,048 tokens, two of them in flight. Experts in INT8 are built for a GPU's
kernel, as a CPU may have none.
"""

import json
import os
import sys
from typing import Any

os.environ.update(VLLM_LOGGING_LEVEL="CRITICAL", HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_DIST_IDENT="x")


def prepare(ranks: int) -> None:
    """A process group of `ranks`, of which this process is all there is."""
    import torch.distributed as dist
    import vllm.distributed.device_communicators.shm_broadcast as broadcast
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.config import VllmConfig
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.oracle import int8
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as experts_in_int8,
    )
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    new_group = dist.new_group
    dist.new_group = lambda ranks=None, *_, **__: new_group(ranks, backend="fake")
    broadcast.MessageQueue.create_from_process_group = staticmethod(lambda *_, **__: None)
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
    CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(lambda *_: [MultipleOf(16)])  # as on GPUs
    VllmConfig.max_concurrent_batches = property(lambda self: 2)  # as with asynchronous scheduling
    triton = int8.Int8MoeBackend.TRITON
    experts_in_int8.select_int8_moe_backend = lambda **_: (triton, int8.backend_to_kernel_cls(triton)[0])
    parallel_state._node_count = lambda *_: 1
    parallel_state.in_the_same_node_as = lambda *_, **__: [True] * ranks


def sizes(folder: str, ranks: int, context: int, text_only: bool = False, **options: Any) -> dict[str, int]:
    """Bytes of weights and rotary tables, and what one request of `context` tokens takes of the KV cache."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.core import kv_cache_utils

    if text_only:
        options["limit_mm_per_prompt"] = {"image": 0, "video": 0, "audio": 0}
    config = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=context,
        dtype="bfloat16",
        max_num_batched_tokens=2048,
        max_num_seqs=16,
        block_size=16,
        enable_prefix_caching=True,
        **options,
    ).create_engine_config()
    config.parallel_config.tensor_parallel_size = config.parallel_config.world_size = ranks
    with set_current_vllm_config(config):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.init_distributed_environment(ranks, 0, "tcp://127.0.0.1:29555", 0, "gloo")
            parallel_state.initialize_model_parallel(ranks, 1)
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            model = initialize_model(vllm_config=config)
        current_platform.update_block_size_for_backend(config)
        layers = config.compilation_config.static_forward_context
        specs = {
            name: spec
            for name, layer in layers.items()
            if isinstance(layer, AttentionLayerBase)
            and not getattr(layer, "kv_sharing_target_layer_name", None)
            and (spec := layer.get_kv_cache_spec(config))
        }
        config.cache_config.kv_cache_layout = "LBNHC"
        groups = kv_cache_utils.get_kv_cache_groups(config, specs)
        block = kv_cache_utils._pool_bytes_per_block(config, groups)
        request = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
    state = model.state_dict(keep_vars=True)
    kept = {  # where vLLM runs transformers' own code, norms are no longer on the meta device
        id(t): t
        for n, t in state.items()
        if (t.is_meta or isinstance(t, torch.nn.Parameter))
        and not n.endswith(("_k_scale", "_v_scale", "_q_scale", "_prob_scale", "weight_zero_point"))
    }
    tables = {id(t): t for n, t in model.named_buffers() if n.endswith("cos_sin_cache")}
    return {
        "weights": sum(t.nbytes for t in kept.values()),
        "rotary": sum(t.nbytes for t in tables.values()),
        "block": block,
        "blocks": request // block,
    }


def main() -> None:
    ranks, options = int(sys.argv[1]), json.loads(sys.argv[2])
    prepare(ranks)
    print(json.dumps({folder: sizes(folder, ranks, **options) for folder in sys.argv[3:]}))


if __name__ == "__main__":
    main()
