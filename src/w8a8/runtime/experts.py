"""Experts one by one, in place of the module in which transformers holds all experts of a layer.

transformers keeps the experts' weights as 3-D parameters (`gate_up_proj` [experts, 2 x inner, hidden], `down_proj`
[experts, hidden, inner], some transposed). Here each expert has a linear layer per projection (a `W8A8Linear`, where it
is INT8), and only the chosen ones run, each on all its tokens at once. What lies between the projections (the
activation, clamps, a norm) is computed by the code of the module that was replaced; the routers are untouched.

For token t, its chosen experts e with weights r, and f_e = down_e(between(gate_e(x), up_e(x))):

    y = sum(r * f_e(x))     FP32, in the order of the experts' numbers; rounded once, to the dtype of x
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from w8a8.errors import UnsupportedModelError, UnsupportedSchemeError
from w8a8.runtime.linear import W8A8Linear

LAYER = re.compile(r"(?P<place>.+)\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)\.(?P<number>\d+)")
"""The path of one expert's linear layer in a model: `place` is that of the `Experts`."""


Linear = Callable[..., nn.Module]
"""Makes a linear layer, as `nn.Linear` does."""


class Experts(nn.Module):  # type: ignore[misc]
    """The experts of one layer: `gate_proj` (unless they have none), `up_proj` and `down_proj`, a list of each.

    Where they are `joined`, `gate_up_proj` takes the place of the first two, its rows as the replaced module has them.
    Where the replaced module has biases, each layer has its own if they are `split`; else there are those of the
    module, `gate_up_proj_bias` [experts, 2 x inner] and `down_proj_bias` [experts, hidden], which INT8 layers take.
    """

    def __init__(
        self,
        experts: nn.Module,
        between: Callable[[Tensor], Tensor],
        *,
        transposed: bool,
        split: bool,
        joined: bool,
        linear: Linear,
    ) -> None:
        """Make what replaces `experts`, without weights, on the meta device; its layers are `linear`.

        `between` computes what the module does of the outputs of gate and up, which lie beside each other as in its
        weights; these are `transposed` where they are stored as [experts, in, out].
        """
        super().__init__()
        self.gated, self.joined = getattr(experts, "has_gate", True), joined
        self.interleaved = not getattr(experts, "is_concatenated", True)
        self.between = between
        count, *outward, inward = experts.down_proj.shape
        hidden, inner = (inward, *outward) if transposed else (*outward, inward)
        biased, normed = getattr(experts, "has_bias", False), getattr(experts, "has_post_expert_norm", False)

        def layers(columns: int, rows: int) -> nn.ModuleList:
            bias, dtype = biased and split, experts.down_proj.dtype
            return nn.ModuleList(linear(columns, rows, bias=bias, dtype=dtype, device="meta") for _ in range(count))

        if joined:
            self.gate_up_proj = layers(hidden, 2 * inner)
        else:
            if self.gated:
                self.gate_proj = layers(hidden, inner)
            self.up_proj = layers(hidden, inner)
        self.down_proj = layers(inner, hidden)
        self.gate_up_proj_bias = experts.gate_up_proj_bias if biased and not split else None
        self.down_proj_bias = experts.down_proj_bias if biased and not split else None
        self.post_expert_norm = experts.post_expert_norm if normed else None

    def expert(self, number: int, states: Tensor) -> Tensor:
        """Run one expert on `states` [tokens, hidden]."""
        bias = None if self.down_proj_bias is None else self.down_proj_bias[number]
        states = _run(self.down_proj[number], self.inner(number, states), bias)
        return states if self.post_expert_norm is None else self.post_expert_norm(states)

    def inner(self, number: int, states: Tensor) -> Tensor:
        """What the `down_proj` of one expert reads [tokens, inner] where the expert reads `states` [tokens, hidden]."""
        bias = None if self.gate_up_proj_bias is None else self.gate_up_proj_bias[number]
        if self.joined:
            return self.between(_run(self.gate_up_proj[number], states, bias))
        return self.between(self._apart(number, states, bias))

    def _apart(self, number: int, states: Tensor, bias: Tensor | None) -> Tensor:
        """The outputs of gate and up, with their `bias`, beside each other as `between` takes them."""
        parts = [self.gate_proj[number], self.up_proj[number]] if self.gated else [self.up_proj[number]]
        if bias is None:
            biases = [None] * len(parts)
        else:
            biases = [bias[0::2], bias[1::2]] if self.interleaved else bias.chunk(2)
        made = [_run(part, states, own) for part, own in zip(parts, biases, strict=True)]
        return torch.stack(made, -1).flatten(-2) if self.interleaved else torch.cat(made, -1)


def _run(layer: nn.Module, states: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = layer(states) if bias is None else layer(states, bias)
    return made


class W8A8Experts(Experts):
    """Experts of which the router chooses some for each token; what they give is weighted and summed."""

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum the chosen experts' outputs [tokens, hidden] for `hidden_states` [tokens, hidden].

        `chosen` [tokens, k] are experts' numbers, `weights` [tokens, k] theirs; a number past the last one is nobody's.
        """
        return self.total(hidden_states, chosen, weights).to(hidden_states.dtype)

    def total(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Compute the same in FP32."""
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        order = chosen.reshape(-1).argsort(stable=True)
        counts = chosen.reshape(-1).bincount(minlength=len(self.down_proj)).tolist()
        for number, places in enumerate(order.split(counts)[: len(self.down_proj)]):
            if len(places):
                tokens = places // chosen.shape[1]
                states = self.expert(number, hidden_states[tokens])
                total.index_add_(0, tokens, (states.float() * weights.reshape(-1, 1)[places]).float())
        return total


class W8A8ZeroExperts(W8A8Experts):
    """Experts of which those past the last one give back what they read (LongCat Flash)."""

    def total(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Add to what the chosen experts give the states times the weights of those that change nothing."""
        unchanged = (weights.float() * (chosen >= len(self.down_proj))).sum(-1, keepdim=True)
        return super().total(hidden_states, chosen, weights) + hidden_states.float() * unchanged


class W8A8ScaledExperts(Experts):
    """Experts that read states already multiplied by the router's weights: zeros, where one is not chosen (Llama 4)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `hidden_states` [experts x tokens, hidden], expert by expert, to the same shape; zeros stay zeros."""
        out = torch.zeros_like(hidden_states)
        rows = hidden_states.any(-1).nonzero().squeeze(-1)
        counts = (rows // (len(hidden_states) // len(self.down_proj))).bincount(minlength=len(self.down_proj))
        for number, own in enumerate(rows.split(counts.tolist())):
            if len(own):
                out[own] = self.expert(number, hidden_states[own])
        return out


def in_int8(name: str, experts: nn.Module, *, split: bool, joined: bool = False) -> Experts:
    """Make what replaces the module `experts`, called `name`, where they are INT8.

    Its biases may be `split`, for each expert its own; gate and up may be `joined`, one layer for both.
    Raises UnsupportedSchemeError for a module of an unknown kind.
    """
    made = _one_by_one(experts, W8A8Linear, split=split, joined=joined)
    if made is None:
        raise UnsupportedSchemeError(
            f"{name}: these experts are INT8, and a {type(experts).__name__} cannot run in INT8 here. vLLM may load it"
        )
    return made


def apart(name: str, experts: nn.Module, linear: Linear, *, split: bool, joined: bool = False) -> Experts:
    """Make what replaces the module `experts`, called `name`, by layers that are `linear`, as of `in_int8`.

    Raises UnsupportedModelError for a module of an unknown kind.
    """
    made = _one_by_one(experts, linear, split=split, joined=joined)
    if made is None:
        raise UnsupportedModelError(
            f"{name}: a {type(experts).__name__} cannot be run expert by expert, so it cannot be calibrated; "
            "--recipe rtn takes it, or leave its experts as they are: --exclude '*.experts.*'"
        )
    return made


def _one_by_one(experts: nn.Module, linear: Linear, *, split: bool, joined: bool) -> Experts | None:
    """What replaces the module `experts`; None for one of an unknown kind.

    Known are classes that follow transformers' interface for experts (`transformers.integrations.moe`), which take
    states, numbers and weights, and say by `_apply_gate` what lies between the projections; those of Llama 4 and of
    LongCat Flash.
    """
    kind: type[Experts] = W8A8Experts
    transposed = getattr(experts, "is_transposed", False)
    between: Callable[[Tensor], Tensor] = partial(_default_apply_gate, experts)
    if type(experts).__name__ == "Llama4TextExperts":
        kind, transposed = W8A8ScaledExperts, True
    elif type(experts).__name__ == "LongcatFlashExperts":
        kind = W8A8ZeroExperts
    elif hasattr(experts, "_apply_gate"):
        between = experts._apply_gate if getattr(experts, "has_gate", True) else experts.act_fn
    else:
        return None
    return kind(experts, between, transposed=transposed, split=split, joined=joined, linear=linear)


def holds_experts(module: nn.Module) -> bool:
    """Whether `module` holds the weights of all experts of a layer as 3-D parameters."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3
