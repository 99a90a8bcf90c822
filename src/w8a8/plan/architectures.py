"""The tables of `architectures.toml`, checked and as values: all that this tool knows of an architecture by name.

`Rules` judges tensors by a table, `w8a8.recipes` folds by its groups, `w8a8.memory` counts by its `memory`.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args, get_type_hints

from w8a8.formats import FORMATS
from w8a8.formats.detect import section
from w8a8.sources.experts import Stack

GENERIC = "generic"
EACH = "*"
Kind = Literal["norm", "linear", "value"]

_BY_KEY = ("keep", "never", "reasons", "quantize", "memory")
"""What a table takes from another one key by key."""
_FLAGS = ("whole", "stacked", "rotates")
_KEYS = {"like", "model_types", "text", "fused", "stacks", "spellings", "groups", *_FLAGS, *_BY_KEY}


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers that read the same activations, and what makes these, if it can be rescaled; paths inside a layer.

    `kind` says how the producer makes them (`w8a8.recipes.groups`), `offset` what a norm adds to its weight. `readers`
    are other modules that read them and are not quantized (routers, small gates): their columns are multiplied, too.
    `EACH` in a path stands for every expert's number. `start` is the first row of a linear producer that makes them,
    where others of its rows make something else.
    """

    name: str
    consumers: tuple[str, ...]
    producer: str | None = None
    kind: Kind | None = None
    offset: float = 0.0
    readers: tuple[str, ...] = ()
    start: int = 0


@dataclass(frozen=True, slots=True)
class Attention:
    """The last parts of the names of attention's projections (`fused`: those that make keys along with others), and of
    the norm of its keys."""

    query: str
    key: str
    value: str
    fused: tuple[str, ...]
    key_norm: str


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: the last parts of the names of the projection to what is kept of a token and what
    rotates of it, of the norm of what is kept, and of the projection back to heads. Empty names: there is none."""

    down: str
    norm: str
    up: str


@dataclass(frozen=True, slots=True)
class StateRules:
    """States of fixed size: keys of config.json for groups, for a key head's size, and for the recurrent state's dtype,
    and the bytes of its elements where the config does not say."""

    groups: tuple[str, ...]
    key_dim: tuple[str, ...]
    dtype: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class MemoryRules:
    """What the memory count needs; `architectures.toml` says what each key means."""

    defaults: Mapping[str, Any]
    full_every: tuple[str, ...]
    shared_layers: str
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    tables: tuple[str, ...]
    mlp: tuple[str, ...]
    mlp_fused: tuple[str, ...]
    head_norms: tuple[str, ...]
    attention: Attention
    latent: Latent
    state: StateRules
    experts: tuple[str, ...]
    experts_per_token: tuple[str, ...]
    by_vocabulary: tuple[str, ...]
    by_rows: tuple[str, ...]
    by_columns: tuple[str, ...]
    in_fp32: tuple[str, ...]
    rotary_tables: bool
    rotary_only_if: tuple[str, ...]
    rotary_bytes: int
    split_towers: bool
    video_tokens: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """One table, with what is common to all; `keep` and `quantize` are patterns by component.

    `never` and `reasons` say why components are kept. `stacks` are all that tensors of experts may be, its own first;
    `saved` are those that transformers saves. `rotates` says that `plan/rotation.py` knows its layers.
    """

    name: str
    model_types: tuple[str, ...]
    keep: Mapping[str, tuple[str, ...]]
    never: Mapping[str, str]
    reasons: Mapping[str, str]
    quantize: Mapping[str, tuple[str, ...]]
    text: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...]
    whole: bool
    saved: tuple[Stack, ...]
    stacks: tuple[Stack, ...]
    spellings: tuple[str, ...]
    groups: tuple[Group, ...]
    rotates: bool
    memory: MemoryRules


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a model's config.json, by its `model_type`; the generic one where none is for it."""
    model_type = str(config.get("model_type", ""))
    return next((each for each in known().values() if model_type in each.model_types), known()[GENERIC])


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a model's config.json that describes the decoder."""
    return next((found for key in ("text_config", "llm_config") if (found := section(config, key))), config)


def architectures() -> tuple[str, ...]:
    """Every `model_type` that has a table."""
    return tuple(sorted(model_type for each in known().values() for model_type in each.model_types))


@cache
def known() -> Mapping[str, Architecture]:
    """Every table by its name."""
    return read(files("w8a8.plan").joinpath("architectures.toml").read_text(encoding="utf-8"))


def read(text: str) -> Mapping[str, Architecture]:
    """The tables of a TOML text by name. Raises `ValueError`, which says what is wrong where."""
    values = tomllib.loads(text)
    _check_keys(values, {"stacks", "keep", "never", "quantize", "memory", "architecture"}, "the file")
    tables: dict[str, Mapping[str, Any]] = {}
    for name, table in values["architecture"].items():
        _check_keys(table, _KEYS, name)
        tables[name] = _inherit(table, tables, name)
    return {name: _architecture(name, table, values) for name, table in tables.items()}


def _inherit(table: Mapping[str, Any], above: Mapping[str, Mapping[str, Any]], where: str) -> Mapping[str, Any]:
    """The table with what it takes from the one above that it is `like`."""
    if "like" not in table:
        return table
    if table["like"] not in above:
        raise ValueError(f"{where}: like = {table['like']!r} names no table above this one")
    other = {key: value for key, value in above[table["like"]].items() if key != "rotates"}
    return {**other, **table, **{key: {**other.get(key, {}), **table.get(key, {})} for key in _BY_KEY}}


def _architecture(name: str, table: Mapping[str, Any], common: Mapping[str, Any]) -> Architecture:
    own, kept = table.get("keep", {}), common["keep"]
    stacks, shared = (tuple(_stack(each, f"{name}.stacks") for each in at.get("stacks", [])) for at in (table, common))
    if missing := {"model_types", "quantize", "fused"} - set(table):
        raise ValueError(f"{name}: {', '.join(sorted(missing))} missing")
    return Architecture(
        name=name,
        model_types=_strings(table["model_types"], f"{name}.model_types"),
        keep={
            part: (*_strings(own.get(part, []), f"{name}.keep"), *_strings(kept.get(part, []), "keep"))
            for part in {**own, **kept}
        },
        never=_texts({**common["never"], **table.get("never", {})}, f"{name}.never"),
        reasons=_texts(table.get("reasons", {}), f"{name}.reasons"),
        quantize={
            part: _strings(globs, f"{name}.quantize")
            for part, globs in {**common["quantize"], **table["quantize"]}.items()
        },
        text=_strings(table.get("text", []), f"{name}.text"),
        fused=tuple(_strings(group, f"{name}.fused") for group in table["fused"]),
        whole=_value(bool, table.get("whole", False), f"{name}.whole"),
        saved=(*stacks, *(shared if _value(bool, table.get("stacked", False), f"{name}.stacked") else ())),
        stacks=(*stacks, *shared),
        spellings=_strings(table.get("spellings", list(FORMATS)), f"{name}.spellings"),
        groups=tuple(_group(each, f"{name}.groups") for each in table.get("groups", [])),
        rotates=_value(bool, table.get("rotates", False), f"{name}.rotates"),
        memory=_record(MemoryRules, {**common["memory"], **table.get("memory", {})}, f"{name}.memory"),
    )


def _group(table: Mapping[str, Any], where: str) -> Group:
    where = f"{where}, {table.get('name')!r}"
    _check_keys(table, {field.name for field in fields(Group)} - {"start"}, where)
    consumers, producer, kind = table.get("consumers"), table.get("producer"), table.get("kind")
    if not isinstance(table.get("name"), str) or not consumers:
        raise ValueError(f"{where}: a group has a name and consumers")
    if (producer is None) != (kind is None) or kind not in {*get_args(Kind), None}:
        raise ValueError(f"{where}: kind is one of {', '.join(get_args(Kind))} where there is a producer, else absent")
    if "offset" in table and (kind != "norm" or not isinstance(table["offset"], float)):
        raise ValueError(f"{where}: offset is a number like 1.0 that a norm adds to its weight")
    readers = _strings(table.get("readers", []), where)
    return Group(table["name"], _strings(consumers, where), producer, kind, table.get("offset", 0.0), readers)


def _stack(table: Mapping[str, Any], where: str) -> Stack:
    where = f"{where}, {table.get('tensor')!r}"
    stack: Stack = _record(Stack, {"transposed": False, "interleaved": False, "columns": "", **table}, where)
    if not stack.parts or any(part.count("{}") != 1 for part in stack.parts):
        raise ValueError(f"{where}: each of its parts has one {{}}, for the expert's number")
    return stack


def _record(kind: Any, table: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a table that has exactly its fields, each of its type."""
    types = get_type_hints(kind)
    _check_keys(table, set(types), where)
    if missing := set(types) - set(table):
        raise ValueError(f"{where}: {', '.join(sorted(missing))} missing")
    return kind(**{key: _value(types[key], table[key], f"{where}.{key}") for key in types})


def _value(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return _record(kind, value, where)
    if kind == tuple[str, ...]:
        return _strings(value, where)
    if (kind == Mapping[str, Any] and isinstance(value, dict)) or type(value) is kind:
        return value
    raise ValueError(f"{where}: {value!r} is of the wrong type")


def _texts(values: Mapping[str, Any], where: str) -> Mapping[str, str]:
    return {key: _value(str, value, f"{where}.{key}") for key, value in values.items()}


def _strings(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: {values!r} is no list of strings")
    return tuple(values)


def _check_keys(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    if unknown := set(table) - allowed:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}; there are {', '.join(sorted(allowed))}")
