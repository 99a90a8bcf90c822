"""Run inside vLLM's environment: its INT8 kernel for the CPU on one layer. `vllm_linear.py IN OUT`

IN holds `weight` int8 [out, in], `weight_scale` float32 [out], and inputs `x.*` [tokens, in]; OUT gets, of each of
those, `codes.*` int8, `scale.*` float32 and `y.*` in the input's dtype.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from vllm import _custom_ops as ops

FLAGS = (True, False, 32)
"""Dynamic activation scales, no zero points, a cache of 32 shapes: as its W8A8 layers pass them."""


def main(source: str, target: str) -> None:
    """Quantize each input per token, multiply, scale."""
    tensors = load_file(source)
    weight, scale = tensors.pop("weight"), tensors.pop("weight_scale")
    results: dict[str, torch.Tensor] = {}
    for name, x in tensors.items():
        layer = ops.create_onednn_scaled_mm(weight.t(), scale.view(-1, 1), x.dtype, *FLAGS)
        codes, token_scale, _ = ops.onednn_scaled_int8_quant(x, None, None, symmetric=True)
        y = torch.empty(len(x), len(weight), dtype=x.dtype)
        ops.onednn_scaled_mm(layer, codes, y, token_scale, None, None, None)
        _, _, key = name.partition(".")
        results |= {f"codes.{key}": codes, f"scale.{key}": token_scale, f"y.{key}": y}
    save_file(results, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
