"""What vLLM lacks on CPUs without AMX for INT8 models, in plain torch; loaded in vLLM's process.

That is the kernel for experts. Everything around it stays vLLM's own: its choice of the INT8 method for a config, the
parameters that method builds, the loader that fills them, the router, and the layout in which its Triton kernel reads
gate and up: one half after the other, but interleaved for `SWIGLUOAI`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8
from vllm.model_executor.layers.fused_moe.oracle import int8

GATES: Mapping[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: functional.silu,
    MoEActivation.GELU: functional.gelu,
    MoEActivation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    MoEActivation.RELU2: lambda x: functional.relu(x).square(),
}


class PlainExperts(CPUExpertsInt8):  # type: ignore[misc]
    """vLLM's experts for INT8 on a CPU, computed without its kernel."""

    @staticmethod
    def is_supported_config(*_: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave them as they are."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        *others: Any,
        apply_router_weight_on_input: bool = False,
        **more: Any,
    ) -> None:
        """Add up what each token's experts give."""
        output.zero_()
        for expert in topk_ids.unique().tolist():
            token, place = torch.where(topk_ids == expert)
            bias = [None if b is None else b[expert].float() for b in (self.w1_bias, self.w2_bias)]
            inner = _linear(hidden_states[token], w1[expert], self.w1_scale[expert], bias[0])
            y = _linear(self._activated(activation, inner), w2[expert], self.w2_scale[expert], bias[1])
            if not apply_router_weight_on_input:  # else they are in `hidden_states` already
                y = y * topk_weights[token, place, None]
            output.index_add_(0, token, y.to(output.dtype))

    def _activated(self, activation: MoEActivation, inner: Tensor) -> Tensor:
        if not activation.is_gated:
            return GATES[MoEActivation(activation.value.removesuffix("_no_mul"))](inner)
        if activation == MoEActivation.SWIGLUOAI:  # interleaved, as in vLLM's SwigluOAIAndMul.forward_native
            gate, up = inner[:, ::2].clamp(max=7), inner[:, 1::2].clamp(-7, 7)
            return (up + 1) * gate * torch.sigmoid(1.702 * gate)
        gate, up = inner.chunk(2, 1)
        if (limit := self.moe_config.swiglu_limit) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return GATES[activation](gate) * up


def _linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """INT8 W8A8, exact: x [tokens, in], codes int8 [out, in], scale [out] or [out, 1]."""
    x = x.float()
    step = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    sums = ((x / step).round().double() @ codes.double().T).float()
    y = sums * scale.reshape(-1) * step
    return y if bias is None else y + bias


def _keep_weights() -> None:
    """Leave an empty weight where vLLM's kernel for linear layers leaves none: its MLA asks that for its device."""
    prepare = CPUInt8ScaledMMLinearKernel.process_weights_for_onednn

    def prepare_and_keep(kernel: Any, layer: Any) -> None:
        prepare(kernel, layer)
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    CPUInt8ScaledMMLinearKernel.process_weights_for_onednn = prepare_and_keep


def install() -> None:
    """Let vLLM choose `PlainExperts` where it looks for a CPU's experts, and its MLA load INT8 layers."""
    _keep_weights()
    known = int8.backend_to_kernel_cls
    int8.backend_to_kernel_cls = lambda backend: (
        [PlainExperts] if backend == int8.Int8MoeBackend.CPU else known(backend)
    )
