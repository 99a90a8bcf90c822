"""The linear layers that stay in BF16: most CPUs cannot multiply it, and torch is slow where they cannot.

A layer's weight stays BF16 in memory, and its tokens and results are BF16 as ever; in between
`w8a8.kernels.cpu.bf16` computes in float32, and rounds once. Who multiplies is decided by this rule, as a result
depends on it in its last bit:

- a CPU without BF16 arithmetic (AVX2, AVX-512 before Cooper Lake and Zen 4): always that kernel;
- a CPU with it (AVX512-BF16, AMX, ARM's): that kernel for up to `FEW` tokens, where reading the weight takes all the
  time and torch's product reads at two thirds of the memory's speed (`w8a8 bench linear`); torch beyond;
- a GPU, another dtype, or where a gradient is wanted: torch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from w8a8.kernels.cpu import bf16, instructions
from w8a8.runtime.linear import openmp_fork

FEW = 8
"""Most tokens for which the kernel multiplies on a CPU that has BF16 arithmetic."""


class BF16Linear(nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with the same parameters and names; on a CPU it computes BF16 in float32, by the rule above."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in] to [..., out] of the same dtype."""
        ours = x.dtype == self.weight.dtype == torch.bfloat16 and x.device.type == self.weight.device.type == "cpu"
        fits = self.weight.is_contiguous() and x.shape[-1:] == (self.in_features,)
        few = not instructions.multiplies_bf16() or x.numel() <= FEW * self.in_features
        if not (ours and fits and few) or torch.is_grad_enabled():
            return super().forward(x)
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        bf16.linear(
            x.data_ptr(),
            self.weight.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            (x.numel() // self.in_features, self.out_features, self.in_features),
            threads=torch.get_num_threads(),
            fork=openmp_fork(),
        )
        return y


def widen(model: Any) -> Any:
    """Make every plain linear layer of `model` that is BF16 a `BF16Linear`, in place; return `model`."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = BF16Linear
    return model
