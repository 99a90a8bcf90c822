"""One INT8 matrix product, and everything here that can compute it: this project's kernel and its peers.

Every result is checked: ours must equal the integer reference to the bit, a peer's up to its rounding.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w8a8.bench.contest import Work
from w8a8.bench.vllm_kernel import Vllm
from w8a8.errors import SelfCheckError, first_line
from w8a8.kernels.gpu.int8 import scaled_int8_mm
from w8a8.kernels.gpu.tiles import Tile
from w8a8.runtime.linear import padded_int_mm
from w8a8.vllm_plugin.rule import cutlass_fails

PEERS = {
    "vllm": ("vLLM", "vLLM's Triton kernel"),
    "cutlass": ("CUTLASS", "vLLM's CUTLASS kernel"),
    "int_mm": ("int_mm", "torch._int_mm and scaling"),
    "bf16": ("BF16", "BF16"),
}
"""The other contenders, and their names in tables and in sentences."""

_CHECKED = 64
"""Tokens whose results are checked."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Operands of one product: codes int8 [M, K], [N, K] and scales float32 [M, 1], [N, 1]."""

    x: Tensor
    weight: Tensor
    x_scale: Tensor
    weight_scale: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.x.shape[0], *self.weight.shape

    def ours(self, tile: Tile) -> Tensor:
        """Compute it by this project's kernel."""
        return scaled_int8_mm(self.x, self.weight, self.x_scale, self.weight_scale, None, torch.bfloat16, tile=tile)

    def theirs(self, peer: Vllm) -> Tensor:
        """Compute it by vLLM's Triton kernel, called as vLLM's linear layer calls it."""
        return peer.module.triton_scaled_mm(
            self.x, self.weight.t(), scale_a=self.x_scale, scale_b=self.weight_scale, out_dtype=torch.bfloat16
        )

    def cutlass(self) -> Tensor:
        """Compute it by vLLM's CUTLASS kernel, called as vLLM's linear layer calls it. Needs all of vLLM, compiled."""
        from vllm import _custom_ops

        found: Tensor = _custom_ops.cutlass_scaled_mm(
            self.x, self.weight.t(), scale_a=self.x_scale, scale_b=self.weight_scale, out_dtype=torch.bfloat16
        )
        return found

    def composed(self) -> Tensor:
        """Compute it by `torch._int_mm`, which needs at least 17 tokens on CUDA, and scale the result."""
        acc = padded_int_mm(self.x, self.weight, tokens=32, multiple=8)
        return (acc.float() * self.weight_scale.t() * self.x_scale).to(torch.bfloat16)

    def reference(self) -> Tensor:
        """Return the first tokens' exact results: products in FP64, which holds these integers exactly."""
        acc = self.x[:_CHECKED].double() @ self.weight.t().double()
        return (acc.float() * self.weight_scale.t() * self.x_scale[:_CHECKED]).to(torch.bfloat16)


def problems(layers: Sequence[tuple[int, int]], tokens: Sequence[int], device: torch.device) -> Iterator[Problem]:
    """Make random operands for every layer [out, in] and number of tokens, one problem at a time."""
    for outputs, inputs in layers:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        weight_scale = torch.rand(outputs, 1, device=device) / 1000
        for count in tokens:
            x = torch.randint(-127, 128, (count, inputs), dtype=torch.int8, device=device)
            yield Problem(x, weight, torch.rand(count, 1, device=device) / 100, weight_scale)


def torch_kernels(problem: Problem) -> dict[str, Work]:
    """Return torch's ways to compute `problem`: `_int_mm` with scaling, and BF16 from operands made here."""
    activations, weight = problem.x.to(torch.bfloat16), problem.weight.to(torch.bfloat16)
    return {"int_mm": problem.composed, "bf16": lambda: activations @ weight.t()}


def vllm_kernels(arch: str, problem: Problem, peer: Vllm | None) -> dict[str, Work]:
    """Return vLLM's kernels that can run here; CUTLASS only from this environment's vLLM, where it has INT8."""
    found: dict[str, Work] = {}
    if peer is not None:
        found["vllm"] = lambda: problem.theirs(peer)
    if takes_cutlass(arch) and importlib.util.find_spec("vllm"):
        found["cutlass"] = problem.cutlass
    return found


def takes_cutlass(arch: str) -> bool:
    """Whether vLLM's own choice for INT8 layers on `arch` is CUTLASS, and works."""
    return arch.startswith("sm_") and not cutlass_fails(arch)


def able(peers: Mapping[str, Work], problem: Problem, notice: Callable[[str], None]) -> dict[str, Work]:
    """Return the peers that run here. Raises SelfCheckError where one computes a wrong result."""
    found = {}
    for name, work in peers.items():
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - some GPUs' libraries cannot do what some peers ask of them
            notice(f"{name} cannot take part: {type(error).__name__}: {first_line(error)}")
            continue
        if name != "bf16":
            check(result, problem.reference(), f"{name}'s", rtol=2**-7)
        found[name] = work
    return found


def check(result: Tensor, expected: Tensor, whose: str, rtol: float = 0) -> None:
    """Raise SelfCheckError where the first tokens' results are not `expected`, to the bit or within `rtol`."""
    if not torch.allclose(result[: len(expected)], expected, rtol=rtol, atol=0):
        raise SelfCheckError(f"{whose} result is wrong for {[*result.shape]}; please report this")
