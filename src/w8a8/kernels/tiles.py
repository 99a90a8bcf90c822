"""Which tile computes an INT8 matrix product: small tables per architecture and band of M, with the reason for each."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of `int8_gpu`'s kernels: sizes of the block that one program computes, and how it is compiled.

    `block_m` tokens x `block_n` output channels, in steps of `block_k` inputs; `group_m` rows of blocks share the
    cache; `split_k` programs share one dot product.
    """

    block_m: int
    block_n: int
    block_k: int
    unroll: int = 1
    group_m: int = 8
    split_k: int = 1
    swap: bool = False
    num_warps: int = 4
    num_stages: int = 2
    kpack: int = 1

    def compiler_options(self) -> dict[str, int]:
        """What Triton's compiler takes; `kpack` is AMD's alone and given only where it says something."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.kpack == 1 else {**options, "kpack": self.kpack}


def architecture(device: torch.device | str) -> str:
    """The GPU's architecture as compilers call it (`gfx1100`, `sm_90`); `cpu` for what is no GPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return "cpu"
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def choose(arch: str, m: int, n: int, k: int) -> Tile:
    """The tile for `m` tokens, `n` output channels and `k` inputs."""
    if m <= 16:
        return Tile(16, 64, 128)
    return Tile(64, 64, 128)


def faster(arch: str) -> bool:
    """Whether a tuning on this machine measured these kernels to be faster than vLLM's Triton kernel on `arch`."""
    return False
