"""Read a model's decoder layers, and what each keeps per token and per sequence, from headers and config.

The shapes in the headers are the truth (those of the logical tensors, where a checkpoint is quantized already):
published configs leave out what their class has as a default (Gemma 3's do not even say how many heads there are), and
a head is as wide as its norm. The config is asked for what shapes do not show: which layers look at a window only,
which reuse another layer's cache, how long a context may be. The names of tensors and of the config's keys are in the
architecture's table (`memory` in `architectures.toml`). What is found but cannot be counted is said in
`Model.uncounted`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache, cached_property, lru_cache
from typing import Any, Literal

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.errors import NoConfigError
from w8a8.formats import detect
from w8a8.formats.detect import section
from w8a8.memory.layers import Layer, Tensors, attends, caches, find, latent, state
from w8a8.plan import Rules, architecture_of, module_name
from w8a8.plan.architectures import MemoryRules, text_section
from w8a8.sources.opening import owners as owners_of
from w8a8.sources.view import LogicalTensor

LARGEST = 2**40
"""No number that makes sense in a config is larger."""

_LAYER = re.compile(r".*?(?:^|\.)(?:layers|h|blocks)\.(?P<index>\d+)\.(?P<leaf>.+)")
OUTSIDE = ("vision tower", "audio tower", "projector", "mtp head")
"""Components outside the decoder."""

_KINDS: Mapping[str, Literal["sliding", "chunked"]] = {
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}
_WINDOWS = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
"""How layers with a window attend, and the config's key for its size."""

_RECURRENT = (".A_log", ".dt_bias", "conv1d.weight", ".time_decay", ".time_mix_k", ".rg_lru.recurrent_param", ".decay")
"""Endings of parameters that only layers with a state have."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SCALE = re.compile(r"\.weight_(scale|scale_inv|zero_point)$")


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a layer: each is `width` wide, a token goes through `per_token` of them."""

    width: int
    per_token: int


@dataclass(frozen=True)
class Model:
    """A checkpoint's decoder; numbers are those of the whole model, before tensor parallelism.

    `owners`: by the name of a stored tensor, the logical tensor that it is a part of. `components`: the component of
    every stored tensor by name, as in `w8a8.plan`; a scale belongs to its weight's. `quantized` says how the checkpoint
    is quantized, if it is in another way than W8A8.
    `uncounted`: what is found but not counted, each for a person to read.
    """

    checkpoint: Checkpoint
    rules: Rules
    table: MemoryRules
    text: Mapping[str, Any]
    quantized: str
    owners: Mapping[str, LogicalTensor]
    components: Mapping[str, str]
    layers: tuple[Layer, ...]
    hidden: int
    intermediate: int
    experts: Experts | None
    heads: int
    vocabulary: int
    max_context: int
    uncounted: tuple[str, ...]

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> "Model":
        """Read the headers and the config. Raises `NoConfigError` where they do not describe a decoder."""
        rules, table = Rules.for_config(checkpoint.config), architecture_of(checkpoint.config).memory
        text = text_config(checkpoint.config, table.defaults)
        quantized, owners = owners_of(checkpoint)
        kinds = {kind: component(rules, kind) for kind in {kind_of(tensor.name) for tensor in owners.values()}}
        components = {
            name: "mtp head" if _is_behind(owner.name, text) else kinds[kind_of(owner.name)]
            for name, owner in owners.items()
        }
        parts = _Parts(checkpoint, owners, components, table, text)
        return cls(
            checkpoint=checkpoint,
            rules=rules,
            table=table,
            text=text,
            quantized="" if detect(checkpoint.config).w8a8 else quantized,
            owners=owners,
            components=components,
            layers=tuple(parts.layer(index) for index in sorted(parts.tensors)),
            hidden=parts.hidden,
            intermediate=parts.intermediate,
            experts=parts.experts,
            heads=parts.heads,
            vocabulary=parts.vocabulary,
            max_context=parts.max_context,
            uncounted=tuple(parts.uncounted()),
        )

    @cached_property
    def vision(self) -> bool:
        """Whether it has a vision tower."""
        return "vision tower" in self.components.values()

    @cached_property
    def routed(self) -> frozenset[str]:
        """The names of the stored tensors of routed experts."""
        return frozenset(name for name, owner in self.owners.items() if is_expert(self.table, owner.name))


def text_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the decoder, with `defaults` for what it leaves out."""
    text = text_section(config)
    inner = {key: value for key, value in section(text, "attn_config").items() if key not in text}
    return {**inner, **text, **{key: value for key, value in defaults.items() if text.get(key) is None}}


def component(rules: Rules, name: str) -> str:
    """The component of a tensor. A tower's own embeddings count as the tower: they go where it goes."""
    name = _SCALE.sub(".weight", name)
    part = next(
        (part for part in OUTSIDE if part in rules.keep and rules.keep[part].fullmatch("." + module_name(name))), None
    )
    return part or rules.judge(TensorSpec(name, "BF16", (1, 1), "", 0, 0)).component


@lru_cache(maxsize=2**17)
def kind_of(name: str) -> str:
    """A tensor's name with 0 for every number: what is counted alike in all layers, and for all experts."""
    return _NUMBER.sub("0", name)


def is_expert(table: MemoryRules, name: str) -> bool:
    """Whether a tensor belongs to routed experts."""
    return _is_expert(table.experts, kind_of(name))


@cache
def _is_expert(globs: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(translate(pattern), "." + name) for pattern in globs)


def _is_behind(name: str, text: Mapping[str, Any]) -> bool:
    """Whether a tensor is in a layer behind the last one that the config counts: an MTP head, as DeepSeek has it."""
    last = text.get("num_hidden_layers")
    if not text.get("num_nextn_predict_layers") or type(last) is not int or last <= 0:
        return False
    place = layer_of(name)
    return place is not None and place[0] >= last


@lru_cache(maxsize=2**17)
def layer_of(name: str) -> tuple[int, str] | None:
    """The number of the decoder layer in a tensor's name, and the rest of the name."""
    match = _LAYER.fullmatch(name)
    return (int(match["index"]), match["leaf"]) if match and len(match["index"]) < 6 else None


class _Parts:
    """The decoder's tensors, sorted by layer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        owners: Mapping[str, LogicalTensor],
        components: Mapping[str, str],
        table: MemoryRules,
        text: Mapping[str, Any],
    ) -> None:
        self.where, self.table, self.text = checkpoint.path, table, text
        self.tensors: dict[int, dict[str, LogicalTensor]] = {}
        self.routed: dict[str, LogicalTensor] = {}
        self.tables: dict[str, LogicalTensor] = {}
        for name, tensor in owners.items():
            if components[name] in OUTSIDE or name != tensor.stored.name:
                continue
            place = layer_of(tensor.name)
            if place is None:
                self.tables[tensor.name.removesuffix(".weight").rpartition(".")[2]] = tensor
            elif is_expert(table, tensor.name):
                self.routed[kind_of(tensor.name)] = tensor
                self.tensors.setdefault(place[0], {})
            else:
                self.tensors.setdefault(place[0], {})[place[1]] = tensor
        if not self.tensors:
            raise NoConfigError(f"{self.where}: no decoder layers among its tensors (layers.N.*), so nothing to serve")
        embeddings = next((t for name in table.tables if (t := self.tables.get(name))), None)
        if embeddings is None or len(embeddings.shape) != 2:
            raise NoConfigError(f"{self.where}: no token embeddings among its tensors ({table.tables[0]})")
        self.vocabulary, self.hidden = embeddings.shape
        self.attending = [i for i in sorted(self.tensors) if attends(self.tensors[i], table)]
        self.heads = self._first(table.heads, 0) or self._heads_by_shape()
        self.intermediate = max(self._rows(table.mlp), self._rows(table.mlp_fused) // 2)

    def number(self, key: str, default: int | None = None) -> int:
        """A number from the config; `default` where the config has none."""
        value = self.text.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < LARGEST:
            raise NoConfigError(f"{self.where}: config.json says {key}: {value!r:.80}; a positive number is needed")
        return value

    def layer(self, index: int) -> Layer:
        """The cache of layer `index`."""
        tensors = self._tensors_of(index)
        kept = state(tensors, self.table, self._first, self._recurrent_bytes())
        if compressed := latent(tensors, self.table):
            return Layer("latent", 1, compressed[0], rotary=compressed[1], state=kept)
        if (
            not attends(tensors, self.table)
            or (kept and find(tensors, "q_conv1d"))
            or (not kept and self._recurs(index))
        ):
            return Layer("none", state=kept)
        kind = self._kind(index)
        shared = index >= max(self.tensors) + 1 - self._optional(self.table.shared_layers)
        width = self._width(tensors, self.table.attention.key)
        head_dim = self._head_dim(tensors)
        fused = self._fused_heads()  # where one projection makes queries, keys and values
        heads = fused if width is None else max(1, width // head_dim)
        window = self.number(_WINDOWS[kind]) if kind in _WINDOWS else 0
        return Layer(kind, 0 if shared else heads, head_dim, window, shared, head_dim, kept)

    @property
    def max_context(self) -> int:
        """The longest context; 8,192 tokens where the config names none."""
        return self._first(("max_position_embeddings", "n_positions", "model_max_length", "max_seq_len"), 8192)

    @property
    def experts(self) -> Experts | None:
        """The routed experts; where the config does not say how many a token uses, one."""
        widths = [self._expert_width(name, tensor) for name, tensor in self.routed.items()]
        width = max(widths, default=0)
        return Experts(width, self._first(self.table.experts_per_token, 1)) if width else None

    def uncounted(self) -> Iterator[str]:
        """What the tensors show that is not counted."""
        odd = [i for i in sorted(self.tensors) if self._unknown(i)]
        if odd:
            yield f"the cache or state of {_layers(odd)}, of a kind that this version cannot size"
        several = [i for i, tensors in sorted(self.tensors.items()) if caches(tensors, self.table) > 1]
        if several:
            yield f"all but one of the caches of {_layers(several)}: more than one attention module each"
        if any(".indexer." in f".{name}" for tensors in self.tensors.values() for name in tensors):
            yield "the cache of the indexer that chooses which tokens are attended to"
        if self.routed and not any(self.text.get(key) for key in self.table.experts_per_token):
            yield "working memory of more than one expert for a token: the config does not say how many it uses"
        if self.routed and not self.experts:
            yield "the working memory of experts, whose tensors do not show how wide they are"
        if any(tensor.stored.name.endswith("_blocks") for tensor in self.routed.values()):
            yield "what an engine adds to experts in MXFP4 so that they suit the GPU's kernel"

    def _unknown(self, index: int) -> bool:
        """Whether a layer may keep something of a sequence that is not counted."""
        tensors = self._tensors_of(index)
        if state(tensors, self.table, self._first, 2):
            return False
        recurrent = self._recurs(index) or any(name.endswith(_RECURRENT) for name in tensors)
        return recurrent or not (attends(tensors, self.table) or latent(tensors, self.table) or self._is_mlp(index))

    def _recurs(self, index: int) -> bool:
        """Whether the config says that layer `index` keeps a state and no keys, whatever its projections are called."""
        kinds = self.text.get("layer_types")
        return isinstance(kinds, list) and index < len(kinds) and kinds[index] in ("linear_attention", "recurrent")

    def _is_mlp(self, index: int) -> bool:
        """Whether all matrices of a layer belong to an MLP, experts or norms."""
        known = {*self.table.mlp, *self.table.mlp_fused, *self.table.by_columns, "gate", "router"}
        matrices = [name for name, tensor in self.tensors[index].items() if len(tensor.shape) == 2]
        return all(re.sub(r"\.weight.*$", "", name).rpartition(".")[2] in known for name in matrices)

    def _tensors_of(self, index: int) -> Tensors:
        """The tensors of layer `index`; attention that it shares with a layer before it is in that one's (zamba2)."""
        own = self.tensors[index]
        kinds = self.text.get("layers_block_type")
        if attends(own, self.table) or not self.attending or not isinstance(kinds, list):
            return own
        shares = index < len(kinds) and kinds[index] == "hybrid"
        first = self.tensors[self.attending[0]]
        return {**{n: t for n, t in first.items() if ".self_attn." in f".{n}"}, **own} if shares else own

    def _first(self, keys: Iterable[str], default: int) -> int:
        """The config's number under the first of `keys` that it has."""
        key = next((key for key in keys if self.text.get(key) is not None), None)
        return self.number(key) if key else default

    def _fused_heads(self) -> int:
        one = self.text.get("multi_query") is True and self.text.get("new_decoder_architecture") is not True
        return 1 if one else self._first(self.table.kv_heads, self.heads)

    def _recurrent_bytes(self) -> int:
        said = next((str(self.text[key]) for key in self.table.state.dtype if self.text.get(key)), "")
        return {"bfloat16": 2, "float16": 2, "float32": 4}.get(said, self.table.state.bytes)

    def _expert_width(self, name: str, tensor: LogicalTensor) -> int:
        """How wide an expert is, by one of its tensors that leads into it; else 0."""
        leaf = module_name(name).rpartition(".")[2].removesuffix("_blocks")
        if leaf in self.table.mlp and len(tensor.shape) == 2 and ".0." in name.rpartition("experts")[2]:
            return tensor.shape[0]
        if leaf not in self.table.mlp_fused or len(tensor.shape) < 3:
            return 0
        rows, columns = tensor.shape[1:3]
        return (columns if rows == self.hidden else rows) // 2

    def _head_dim(self, tensors: Tensors) -> int:
        """The width of the norm of queries or keys where a layer has one for each head; else the config's number."""
        for path in self.table.head_norms:
            norm = tensors.get(f"{path}.weight")
            if norm is not None and len(norm.shape) == 1 and 0 < norm.shape[0] < 4096:
                if self.heads > 1 and norm.shape[0] == self._width(tensors, self.table.attention.query):
                    break  # one norm over all heads together
                return norm.shape[0]
        return self._first(("head_dim", "attention_head_dim"), max(1, self.hidden // self.heads))

    def _heads_by_shape(self) -> int:
        if not self.attending:
            return 0
        tensors = self.tensors[self.attending[0]]
        norm = next((found for path in self.table.head_norms if (found := tensors.get(f"{path}.weight"))), None)
        width = self._width(tensors, self.table.attention.query)
        if norm is None or not norm.shape or not norm.shape[0] or width is None:
            return self.number("num_attention_heads")  # raises: the config has none either
        return max(1, width // norm.shape[0])

    @staticmethod
    def _width(tensors: Tensors, projection: str) -> int | None:
        tensor = find(tensors, projection)
        return tensor.shape[0] if tensor is not None and tensor.shape else None

    def _rows(self, leaves: tuple[str, ...]) -> int:
        """The largest number of rows of these projections in any layer."""
        endings = tuple(f".{leaf}.weight" for leaf in leaves)
        return max(
            (
                t.shape[0]
                for ts in self.tensors.values()
                for n, t in ts.items()
                if f".{n}".endswith(endings) and t.shape
            ),
            default=0,
        )

    def _optional(self, key: str) -> int:
        value = self.text.get(key)
        return value if type(value) is int and 0 <= value <= len(self.tensors) else 0

    def _kind(self, index: int) -> Literal["full", "sliding", "chunked"]:
        """How layer `index` attends; without `layer_types`, as transformers fills it in."""
        kinds = self.text.get("layer_types")
        if isinstance(kinds, list):
            kind = kinds[index] if index < len(kinds) else None
            if not isinstance(kind, str):
                raise NoConfigError(f"{self.where}: config.json does not say in layer_types what layer {index} is")
            return _KINDS.get(kind, "full")
        if self.text.get("attention_chunk_size") is not None:
            rotates = self.text.get("no_rope_layers")
            rotates = rotates[index] if isinstance(rotates, list) and index < len(rotates) else (index + 1) % 4
            return "chunked" if rotates else "full"
        if keys := [key for key in self.table.full_every if self.text.get(key) is not None]:
            return "sliding" if (index + 1) % self.number(keys[0]) else "full"
        windowed = self.text.get("sliding_window") is not None and self.text.get("use_sliding_window") is not False
        return "sliding" if windowed else "full"


def _layers(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"layer {shown}" if len(indices) == 1 else f"layers {shown}"
