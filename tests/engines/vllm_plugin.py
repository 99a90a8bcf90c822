"""Run inside vLLM's environment: what the plugin does to it. `vllm_plugin.py QUESTIONS.json ANSWERS.json TENSORS`

All of it in one process, since importing vLLM takes long. QUESTIONS holds `kernels`: by name, where and for what layers
a kernel is chosen; `obstacles`: names of what stands in the plugin's way; and `checkpoints`: folders by format.
Without a GPU, vLLM's platform object is told what it is to be; the kernels run in Triton's interpreter.
"""

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ.update(TRITON_INTERPRET="1", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")

import torch
import vllm
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Int8
from vllm.model_executor.layers.quantization.quark.schemes import QuarkW8A8Int8
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.model_executor.models.llama import LlamaMLP
from vllm.platforms import PlatformEnum, current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import set_default_torch_dtype

import w8a8.vllm_plugin
from w8a8.kernels.gpu import tiles

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HIDDEN, INTERMEDIATE, HEADS = 128, 192, 2
MLP = "model.layers.0.mlp"
RANKS, RANK = 2, 1
TOKENS = 5


@contextmanager
def stock() -> Iterator[None]:
    """vLLM as it was before the plugin: what is registered inside is undone."""
    kernels, selected = linear._POSSIBLE_INT8_KERNELS, linear._LINEAR_BACKEND_KERNEL_MAP
    with ExitStack() as stack:
        stack.enter_context(patch.dict(kernels, {key: [*value] for key, value in kernels.items()}))
        stack.enter_context(patch.dict(selected, {key: {*value} for key, value in selected.items()}))
        stack.enter_context(patch.dict(fused_act_quant._FUSED_ACT_QUANT))
        yield


@contextmanager
def stage(platform: str, capability: int | None = None, measured_faster: bool = False) -> Iterator[None]:
    """A platform as vLLM would see it; `capability` is 10 times major plus minor."""
    version = None if capability is None else DeviceCapability(capability // 10, capability % 10)
    with (
        patch.object(current_platform, "_enum", PlatformEnum[platform.upper()]),
        patch.object(current_platform, "get_device_capability", lambda *_: version),
        patch.object(tiles, "faster", lambda _: measured_faster),
    ):
        yield


def kernel_for(
    scheme: str,
    *,
    platform: str,
    capability: int | None = None,
    backend: str = "auto",
    measured_faster: bool = False,
    static: bool = False,
    symmetric: bool = True,
    variables: Mapping[str, str] | None = None,
) -> str:
    """The name of the kernel class that a layer of `scheme` gets, after the plugin was loaded."""
    environment = patch.dict(os.environ, variables or {})
    with stock(), stage(platform, capability, measured_faster), configured(backend), ranks(1, 0), environment:
        w8a8.vllm_plugin.register()
        made = SCHEMES[scheme](static, symmetric)
        made.create_weights(
            torch.nn.Module(),
            [8],
            input_size_per_partition=8,
            params_dtype=torch.bfloat16,
            weight_loader=lambda *_: None,
        )
    return type(made.kernel).__name__


def quark_scheme(static: bool, symmetric: bool) -> Any:
    name = f"kInt8{'StaticTensor' if static else 'DynamicToken'}{'Sym' if symmetric else 'Asym'}"
    return QuarkW8A8Int8(quant_utils.kInt8StaticChannelSym, getattr(quant_utils, name))


SCHEMES: Mapping[str, Callable[[bool, bool], Any]] = {
    "quark": quark_scheme,
    "compressed-tensors": lambda static, symmetric: CompressedTensorsW8A8Int8("channel", static, symmetric),
}


@contextmanager
def configured(backend: str = "auto") -> Iterator[None]:
    """vLLM's configuration, with `backend` as its --linear-backend."""
    with patch.object(CONFIG.kernel_config, "linear_backend", backend), set_current_vllm_config(CONFIG):
        yield


@contextmanager
def ranks(size: int, rank: int) -> Iterator[None]:
    """This process as one of `size` that share the layers."""
    with patch.object(parallel_state, "_TP", SimpleNamespace(world_size=size, rank_in_group=rank)):
        yield


class Said(logging.Handler):
    """What the plugin logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def registering(obstacle: Callable[[], Any]) -> dict[str, Any]:
    """What the plugin says on a ROCm platform with `obstacle` in its way, and whether it changed anything."""
    said, logger = Said(), logging.getLogger("vllm.w8a8")
    logger.setLevel(logging.INFO)
    logger.addHandler(said)
    try:
        with stock(), stage("rocm", 110), obstacle():
            before = lists()
            w8a8.vllm_plugin.register()
            once = lists()
            w8a8.vllm_plugin.register()
            return {"said": said.lines[0], "changed": once != before, "again": lists() != once}
    finally:
        logger.removeHandler(said)


def lists() -> Any:
    selected = linear._LINEAR_BACKEND_KERNEL_MAP.get("triton")
    kernels = {key.name: [*value] for key, value in linear._POSSIBLE_INT8_KERNELS.items()}
    return kernels, selected and {*selected}, [*fused_act_quant._FUSED_ACT_QUANT]


OBSTACLES: Mapping[str, Callable[[], Any]] = {
    "none": ExitStack,
    "switched off": lambda: patch.dict(os.environ, {"W8A8_VLLM_PLUGIN": "0"}),
    "newer vLLM": lambda: patch.object(vllm, "__version__", "0.33.0"),
    "development vLLM": lambda: patch.object(vllm, "__version__", "0.32.1.dev7+gabc"),
    "no Triton": lambda: patch.object(importlib.util, "find_spec", lambda _: None),
    "other lists": lambda: patch.dict(linear._LINEAR_BACKEND_KERNEL_MAP, {"triton": set()}),
    "no lists": lambda: patch.object(linear, "_POSSIBLE_INT8_KERNELS", {}),
}


def layers(folder: Path) -> Iterator[tuple[str, Any]]:
    """This rank's share of a checkpoint's first layer, as vLLM's own classes load it, by name."""
    quantization, stored = opened(folder)
    how: dict[str, Any] = {"bias": False, "quant_config": quantization, "params_dtype": torch.bfloat16}
    attention = "model.layers.0.self_attn"
    made = {
        f"{attention}.qkv_proj": QKVParallelLinear(
            HIDDEN, HIDDEN // HEADS, HEADS, prefix=f"{attention}.qkv_proj", **how
        ),
        f"{attention}.o_proj": RowParallelLinear(HIDDEN, HIDDEN, prefix=f"{attention}.o_proj", **how),
    }
    mlp = llama_mlp(quantization)
    made |= {f"{MLP}.gate_up_proj": mlp.gate_up_proj, f"{MLP}.down_proj": mlp.down_proj}
    for name, layer in made.items():
        load(layer, name, stored)
        yield name, layer


def opened(folder: Path) -> tuple[Any, Mapping[str, Tensor]]:
    """A checkpoint's quantization as vLLM reads it, and its tensors."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization = get_quantization_config(config["quant_method"]).from_config(config)
    quantization.packed_modules_mapping = PACKED
    return quantization, load_file(folder / "model.safetensors")


def llama_mlp(quantization: Any) -> LlamaMLP:
    with set_default_torch_dtype(torch.bfloat16):
        return LlamaMLP(HIDDEN, INTERMEDIATE, "silu", quant_config=quantization, prefix=MLP)


def load(layer: Any, name: str, stored: Mapping[str, Tensor]) -> None:
    """Load a layer by its own loaders, from the tensors that are fused in it."""
    block, _, leaf = name.rpartition(".")
    for i, part in enumerate(PACKED.get(leaf, [leaf])):
        shard = () if leaf not in PACKED else ("qkv"[i],) if leaf == "qkv_proj" else (i,)
        for kind in ("weight", "weight_scale"):
            parameter = getattr(layer, kind)
            parameter.weight_loader(parameter, stored[f"{block}.{part}.{kind}"], *shard)
    layer.quant_method.process_weights_after_loading(layer)


def fused(folder: Path) -> dict[str, Any]:
    """An MLP of Llama's kind as vLLM runs it, with quantization fused into SiLU, and without."""
    quantization, stored = opened(folder)
    mlp = llama_mlp(quantization)
    for name in ("gate_up_proj", "down_proj"):
        load(getattr(mlp, name), f"{MLP}.{name}", stored)
    x = torch.randn(TOKENS, HIDDEN, generator=GENERATOR).to(torch.bfloat16)
    nodes, y = traced(mlp, x)
    with patch.dict(fused_act_quant._FUSED_ACT_QUANT, clear=True):
        apart = mlp(x)
    error = (y.float() - apart.float()).norm() / apart.float().norm()
    ours = [name for name in nodes if name.startswith("w8a8.")]
    return {"nodes": ours, "error": float(error), "equal": torch.equal(y, mlp(x))}


def per_tensor() -> tuple[Any, Any]:
    """A fused layer of three, with one scale each."""
    layer = torch.nn.Module()
    scheme = CompressedTensorsW8A8Int8("tensor", is_static_input_scheme=False, input_symmetric=True)
    scheme.create_weights(
        layer, [8, 16, 24], input_size_per_partition=32, params_dtype=torch.bfloat16, weight_loader=lambda *_: None
    )
    layer.weight.data.copy_(torch.randint(-127, 128, (48, 32)))
    layer.weight_scale.data.copy_(torch.tensor([0.5, 0.25, 2.0]))
    scheme.process_weights_after_loading(layer)
    return layer, scheme


def computed(apply: Callable[..., Tensor], layer: Any, dtype: torch.dtype, bias: bool) -> dict[str, Tensor]:
    """A layer's input, the codes and scales vLLM quantizes it to, and its output.

    Half of a token's largest value would be a tie, on which vLLM's operators for the CPU and for GPUs do not agree:
    here the largest is an outlier, and nothing is half of it.
    """
    n, k = layer.weight.shape
    x = torch.randn(TOKENS, k, generator=GENERATOR)
    x[:, 3] = 129 / 8
    x *= torch.logspace(-2, 2, TOKENS)[:, None]
    x[1] = 0
    x = x.to(dtype)
    added = torch.randn(n, generator=GENERATOR).to(dtype) if bias else None
    codes, scale, _ = ops.scaled_int8_quant(x)
    y = apply(layer, x, added)
    tensors = {
        "x": x,
        "codes": codes,
        "scale": scale,
        "y": y,
        "weight": layer.weight,
        "weight_scale": layer.weight_scale,
    }
    return tensors | ({} if added is None else {"bias": added})


def traced(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[str], Tensor]:
    """The operators that torch.compile finds in `run`, all of it one graph, and what that graph gives."""
    nodes: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    y = torch.compile(lambda x: run(x), fullgraph=True, dynamic=True, backend=backend)(x)
    return nodes, y


def compiled(layer: Any) -> dict[str, Any]:
    """What torch.compile makes of a layer, and what torch says of the operator and its fake."""
    x = torch.randn(TOKENS, layer.weight.shape[1]).to(torch.bfloat16)
    apply = layer.quant_method.apply
    nodes, y = traced(lambda x: apply(layer, x), x)
    with_inductor = torch.compile(lambda x: apply(layer, x), fullgraph=True)(x)
    eager = apply(layer, x)
    linear_arguments = (x, None, layer.weight.data, layer.weight_scale.data, None, torch.bfloat16)
    checks = [
        torch.library.opcheck(torch.ops.w8a8.int8_linear.default, linear_arguments),
        torch.library.opcheck(torch.ops.w8a8.silu_and_mul_quantize.default, (x,)),
    ]
    return {
        "nodes": nodes,
        "equal": torch.equal(y, eager) and torch.equal(with_inductor, eager),
        "opcheck": sorted({outcome for check in checks for outcome in check.values()}),
    }


def shapes(layer: Any) -> list[list[int]]:
    """What comes out for no token at all, for one, and for a batch of sequences."""
    k = layer.weight.shape[1]
    inputs = [torch.ones(0, k), torch.ones(1, k), torch.ones(2, 3, k)]
    return [[*layer.quant_method.apply(layer, x.to(torch.bfloat16)).shape] for x in inputs]


def batch_invariant(layer: Any) -> bool:
    """Whether a token gives the same alone, beside some others, and beside many."""
    x = torch.randn(70, layer.weight.shape[1], generator=GENERATOR).to(torch.bfloat16)
    apply = layer.quant_method.apply
    together = apply(layer, x)
    return all(torch.equal(torch.cat([apply(layer, part) for part in x.split(size)]), together) for size in (1, 20))


def cache_keys() -> list[str]:
    """vLLM's hash of its configuration before and after a layer was given our kernel, and for another layer."""
    with set_current_vllm_config(config := VllmConfig()):
        keys = [config.compute_hash()]
        for _ in range(2):
            per_tensor()
            keys.append(config.compute_hash())
    return keys


def main(questions: Path, answers: Path, tensors: Path) -> None:
    asked = json.loads(questions.read_text())
    found: dict[str, Any] = {
        "kernels": {name: kernel_for(**question) for name, question in asked["kernels"].items()},
        "obstacles": {name: registering(OBSTACLES[name]) for name in asked["obstacles"]},
    }
    results: dict[str, Tensor] = {}
    w8a8.vllm_plugin.register()  # for this platform: the CPU, in Triton's interpreter
    with configured(), ranks(RANKS, RANK):
        for format_, folder in asked["checkpoints"].items():
            for name, layer in layers(Path(folder)):
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    apply = layer.quant_method.apply
                    for key, value in computed(apply, layer, dtype, bias=dtype == torch.float16).items():
                        results[f"{format_}/{name}/{str(dtype)[6:]}/{key}"] = value.detach().clone()
        found["compiled"] = compiled(layer)
        found["shapes"] = shapes(layer)
        found["batch_invariant"] = batch_invariant(layer)
        layer, scheme = per_tensor()
        for key, value in computed(scheme.apply_weights, layer, torch.bfloat16, bias=True).items():
            results[f"per-tensor/{key}"] = value.detach().clone()
    with configured(), ranks(1, 0):
        found["fused"] = {name: fused(Path(folder)) for name, folder in asked["checkpoints"].items()}
        found["cache_keys"] = cache_keys()
    save_file(results, tensors)
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    CONFIG, GENERATOR = VllmConfig(), torch.Generator().manual_seed(0)
    main(*map(Path, sys.argv[1:]))
