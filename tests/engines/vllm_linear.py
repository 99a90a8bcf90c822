"""Run inside vLLM's environment: its INT8 kernel for the CPU on some layers. `vllm_linear.py IN OUT`

IN holds for each layer `LAYER/weight` int8 [out, in], `LAYER/weight_scale` float32 [out], and inputs `LAYER/x.*`
[tokens, in]; OUT gets for each of those `LAYER/codes.*` int8, `LAYER/scale.*` float32 and `LAYER/y.*` in the input's
dtype.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import _custom_ops as ops

FLAGS = (True, False, 32)
"""Dynamic activation scales, no zero points, a cache of 32 shapes: as its W8A8 layers pass them."""


def computed(x: Tensor, weight: Tensor, weight_scale: Tensor) -> dict[str, Tensor]:
    """Quantize per token, multiply, scale."""
    layer = ops.create_onednn_scaled_mm(weight.t(), weight_scale.view(-1, 1), x.dtype, *FLAGS)
    codes, scale, _ = ops.onednn_scaled_int8_quant(x, None, None, symmetric=True)
    y = torch.empty(len(x), len(weight), dtype=x.dtype)
    ops.onednn_scaled_mm(layer, codes, y, scale, None, None, None)
    return {"codes": codes, "scale": scale, "y": y}


def main(source: str, target: str) -> None:
    tensors = load_file(source)
    results: dict[str, Tensor] = {}
    for name, x in tensors.items():
        layer, _, leaf = name.rpartition("/")
        kind, _, key = leaf.partition(".")
        if kind == "x":
            found = computed(x, tensors[f"{layer}/weight"], tensors[f"{layer}/weight_scale"])
            results |= {f"{layer}/{what}.{key}": tensor for what, tensor in found.items()}
    save_file(results, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
