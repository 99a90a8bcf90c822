"""What one decoder layer keeps of a sequence: keys and values, a compressed latent, a state of fixed size.

The shapes in the headers say it, as far as they can: published configs leave out what their class has as a default,
and names of config keys differ where those of tensors do not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from w8a8.plan.architectures import MemoryRules
from w8a8.sources.view import LogicalTensor

Kind = Literal["full", "sliding", "chunked", "latent", "none"]
"""How a layer attends: to all tokens, to the last `window`, within chunks of `window`, to all by way of one compressed
vector per token (MLA); or not at all."""

Tensors = Mapping[str, LogicalTensor]
"""A layer's tensors by the rest of their names."""

CONVOLUTIONS = ("conv1d", "q_conv1d", "k_conv1d", "v_conv1d", "conv")
"""The last parts of the names of convolutions over time, `[channels, 1, taps]`."""


@dataclass(frozen=True, slots=True)
class State:
    """What a layer keeps of a sequence, however long: the last inputs of its convolution, and a recurrent state.

    As in vLLM's `mamba_utils.py`. The convolution has `channels`, and `per_group` more for each of `groups`; it keeps
    `inputs` of each, in 2 bytes. The recurrent state has `recurrent` elements of `recurrent_bytes`. With prefix
    caching, the default, vLLM holds `copies` of both for a sequence.
    """

    channels: int
    inputs: int
    recurrent: int = 0
    recurrent_bytes: int = 2
    heads: int = 0
    groups: int = 0
    per_group: int = 0
    copies: int = 2

    def nbytes(self, gpus: int) -> int:
        """Bytes of one copy on one of `gpus` GPUs."""
        channels = (self.channels + self.groups_on(gpus) * self.per_group) // gpus
        return channels * self.inputs * 2 + self.recurrent // gpus * self.recurrent_bytes

    def groups_on(self, gpus: int) -> int:
        """Groups that all `gpus` hold together: each GPU has one at least, so they may be copied."""
        return self.groups if self.groups % gpus == 0 else max(gpus, self.groups)

    def splits(self, gpus: int) -> bool:
        """Whether `gpus` GPUs can share it."""
        return not (self.channels % gpus or self.recurrent % gpus or self.heads % gpus) and (
            self.groups % gpus == 0 or self.groups == 1
        )


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's cache: `heads` KV heads of `head_dim`, for `window` tokens or (0) all; and its state.

    It has no cache of its own where it uses another layer's (`shared`). Of a latent, `head_dim` is the whole width, and
    there is one on every GPU. `rotary` is the width that positions rotate.
    """

    kind: Kind
    heads: int = 0
    head_dim: int = 0
    window: int = 0
    shared: bool = False
    rotary: int = 0
    state: State | None = None

    def token_bytes(self, gpus: int, element_bytes: int) -> int:
        """Bytes of one token in one layer, on one of `gpus` GPUs; every GPU holds one head at least."""
        if self.shared:
            return 0
        if self.kind == "latent":
            return self.head_dim * element_bytes
        return 2 * max(1, self.heads // gpus) * self.head_dim * element_bytes if self.heads else 0


def latent(tensors: Tensors, table: MemoryRules) -> tuple[int, int] | None:
    """The width of what multi-head latent attention keeps of a token, and how much of it rotates."""
    down, norm = find(tensors, table.latent.down), find(tensors, table.latent.norm)
    if not down or not norm or not down.shape or not norm.shape:
        return None
    width, compressed = down.shape[0], norm.shape[0]
    return (width, width - compressed) if 0 < compressed < width else None


def attends(tensors: Tensors, table: MemoryRules) -> bool:
    """Whether the layer has projections of keys, by themselves or fused with others."""
    return any(find(tensors, leaf) for leaf in (table.attention.key, *table.attention.fused))


def caches(tensors: Tensors, table: MemoryRules) -> int:
    """The number of attention modules in a layer that have keys or a latent of their own."""
    endings = tuple(f".{leaf}.weight" for leaf in (table.attention.key, table.latent.down))
    return sum(f".{name}".endswith(endings) for name in tensors)


def state(
    tensors: Tensors, table: MemoryRules, number: Callable[[tuple[str, ...], int], int], width: int
) -> State | None:
    """The state of a layer that has convolutions over time; None where it has none of a known kind.

    `number` gives a config's number, by the first of some keys that it has; `width` is that of a recurrent state's
    elements in bytes.
    """
    convolutions = {leaf: t for leaf in CONVOLUTIONS if (t := find(tensors, leaf)) and len(t.shape) == 3}
    if not convolutions:
        return None
    taps = max(t.shape[2] for t in convolutions.values())
    channels, inputs = sum(t.shape[0] for t in convolutions.values()), max(0, taps - 1)
    decay, entry, out = (find(tensors, leaf) for leaf in ("A_log", "in_proj", "out_proj"))
    # 1) Short convolutions, without a recurrence (lfm2).
    if decay is None:
        return State(channels, inputs) if set(convolutions) == {"conv"} else None
    heads = decay.numel
    # 2) Mamba 1: a state for each channel.
    if len(decay.shape) == 2 and decay.shape[0] == channels:
        return State(channels, inputs, decay.numel, width)
    # 3) Kimi's delta attention: q, k and v have convolutions of their own.
    if last := convolutions.get("v_conv1d"):
        keys = convolutions.get("k_conv1d", last).shape[0]
        return State(channels, inputs, keys * last.shape[0] // max(heads, 1), width, heads)
    # 4) Mamba 2: `in_proj` makes a gate, the convolution's input and one time step per head.
    if entry and entry.shape:
        inner, groups = entry.shape[0] - channels - heads, number(table.state.groups, 1)
        if not 0 < inner <= channels:
            return None
        per_group = (channels - inner) // groups
        return State(inner, inputs, inner * per_group // 2, width, heads, groups, per_group, copies=3)
    # 5) Gated delta nets: values leave through `out_proj`.
    if out and len(out.shape) == 2:
        return State(channels, inputs, out.shape[1] * number(table.state.key_dim, 128), width, heads)
    return None


def find(tensors: Tensors, leaf: str) -> LogicalTensor | None:
    """The weight of the module, or the parameter, whose name ends so."""
    endings = (f".{leaf}.weight", f".{leaf}", f".{leaf}.linear.weight")
    return next((tensor for name, tensor in tensors.items() if f".{name}".endswith(endings)), None)
