"""`architectures.toml` is read strictly, and what it names is there in real models."""

import re
from collections import defaultdict
from collections.abc import Mapping
from importlib.resources import files

import pytest

from tests.named import NAMES, Family
from w8a8.memory.model import layer_of
from w8a8.plan import architecture_of, architectures, module_name
from w8a8.plan.architectures import Architecture, known, read
from w8a8.sources.experts import Stack

TEXT = files("w8a8.plan").joinpath("architectures.toml").read_text(encoding="utf-8")
SMALL = 'model_types = ["new"]\nfused = []\nquantize.mlp = []\n'
KINDS = "kind is one of norm, linear, value where there is a producer, else absent"
GROUPED = [name for name in NAMES if architecture_of(Family.load(name).checkpoint.config).groups]


def added(table: str) -> Architecture:
    """A table put behind those that there are."""
    return read(f"{TEXT}\n[architecture.new]\n{table}")["new"]


def modules(family: Family) -> list[Mapping[str, bool]]:
    """The modules of each decoder layer by their paths inside it, and whether they are to be quantized."""
    layers: dict[int, dict[str, bool]] = defaultdict(dict)
    for name in family.checkpoint.tensors:
        place = layer_of(name)
        if place and not any(part in name for part in ("vision", "visual", "audio", "mtp")):
            layers[place[0]][module_name(place[1])] = name in family.quantized
    return list(layers.values())


@pytest.mark.parametrize("name", GROUPED)
def test_every_group_is_there_in_a_real_model_and_its_consumers_are_quantized(name: str) -> None:
    family = Family.load(name)
    for group in architecture_of(family.checkpoint.config).groups:
        for layer in modules(family):
            there = [path for path in group.consumers if path in layer]
            assert there, group
            assert all(layer[path] for path in there)
            assert group.producer is None or group.producer in layer
            assert (group.kind == "norm") == (group.producer is not None and not layer[group.producer])
        assert set(group.consumers) == {path for layer in modules(family) for path in group.consumers if path in layer}


@pytest.mark.parametrize("name", GROUPED)
def test_the_groups_hold_every_quantized_layer_once_and_those_that_engines_fuse_together(name: str) -> None:
    family = Family.load(name)
    found = architecture_of(family.checkpoint.config)
    consumers = [path for group in found.groups for path in group.consumers]
    assert len(consumers) == len(set(consumers))
    assert {path for layer in modules(family) for path, quantized in layer.items() if quantized} == set(consumers)
    for fused in found.fused:
        homes = {g.name for g in found.groups for path in g.consumers if path.rpartition(".")[2] in fused}
        assert len(homes) == 1


def test_a_model_type_has_one_table() -> None:
    assert len(architectures()) == len(set(architectures()))
    for model_type in architectures():
        assert model_type in architecture_of({"model_type": model_type}).model_types


def test_what_no_table_is_for_is_read_by_the_generic_one_which_folds_nothing() -> None:
    for config in ({"model_type": "brand_new"}, {"model_type": ["llama"]}, {}):
        assert architecture_of(config) == known()["generic"]
    assert known()["generic"].groups == ()


def test_a_table_takes_what_it_does_not_say_from_the_one_it_is_like() -> None:
    llama, new = known()["llama"], added('like = "llama"\nmodel_types = ["new"]\nmemory.split_towers = true')
    assert (new.quantize, new.fused, new.groups, new.keep) == (llama.quantize, llama.fused, llama.groups, llama.keep)
    assert new.model_types == ("new",)
    assert (new.memory.split_towers, llama.memory.split_towers) == (True, False)
    assert new.memory.by_rows == llama.memory.by_rows
    gemma = added('like = "gemma3"\nmodel_types = ["new"]\nmemory.split_towers = false')
    assert gemma.memory.defaults == known()["gemma3"].memory.defaults


def test_an_architectures_own_patterns_come_first_and_the_common_ones_stay() -> None:
    new = added(f'{SMALL}keep.router = ["*.mine"]\nkeep.special = ["*.x"]')
    assert next(iter(new.keep)) == "router"
    assert new.keep["router"] == ("*.mine", *known()["llama"].keep["router"])
    assert new.keep["special"] == ("*.x",)


def test_an_architectures_own_stacks_come_first_and_the_common_ones_stay() -> None:
    new = added(f'{SMALL}stacks = [{{ tensor = "w", parts = ["a.{{}}", "b.{{}}"], interleaved = true }}]')
    assert new.stacks == (Stack("w", ("a.{}", "b.{}"), interleaved=True), *known()["llama"].stacks)
    llama4 = known()["llama4"].stacks
    assert {stack.tensor: stack.transposed for stack in reversed(llama4)}["experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (f'{SMALL}patterns = ["*"]', "new: unknown patterns; there are fused, groups"),
        (f"{SMALL}memory.by_row = []", "new.memory: unknown by_row"),
        (f'{SMALL}memory.attention.query = "q_proj"', "new.memory.attention: fused, key, key_norm, value missing"),
        (f"{SMALL}memory.split_towers = 1", "new.memory.split_towers: 1 is of the wrong type"),
        (f'{SMALL}memory.mlp = "mlp.fc1"', "new.memory.mlp: 'mlp.fc1' is no list of strings"),
        (f'{SMALL}groups = [{{ name = "o", consumer = ["o"] }}]', "new.groups, 'o': unknown consumer"),
        (f'{SMALL}groups = [{{ name = "o", consumers = [] }}]', "new.groups, 'o': a group has a name and consumers"),
        (
            f'{SMALL}groups = [{{ name = "o", consumers = ["o"], producer = "v" }}]',
            KINDS,
        ),
        (f'{SMALL}groups = [{{ name = "o", consumers = ["o"], kind = "norm" }}]', KINDS),
        (
            f'{SMALL}groups = [{{ name = "o", consumers = ["o"], producer = "v", kind = "values" }}]',
            KINDS,
        ),
        (
            f'{SMALL}groups = [{{ name = "o", consumers = ["o"], producer = "v", kind = "value", offset = 1.0 }}]',
            "offset is a number like 1.0 that a norm adds",
        ),
        (f'{SMALL}stacks = [{{ tensor = "w", parts = ["w"] }}]', "new.stacks, 'w': each of its parts has one {}"),
        (f'{SMALL}stacks = [{{ tensor = "w", parts = [] }}]', "new.stacks, 'w': each of its parts has one {}"),
        (f'{SMALL}stacks = [{{ tensor = "w", part = ["{{}}"] }}]', "new.stacks, 'w': unknown part; there are"),
        ('model_types = ["new"]\nfused = []', "new: quantize missing"),
        ('like = "lama"\nmodel_types = ["new"]', "new: like = 'lama' names no table above this one"),
        ('model_types = "new"\nfused = []\nquantize.mlp = []', "new.model_types: 'new' is no list of strings"),
    ],
)
def test_a_mistake_in_a_table_is_said(table: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        added(table)


def test_a_mistake_outside_the_tables_is_said() -> None:
    with pytest.raises(ValueError, match="the file: unknown keeps"):
        read(f'keeps.x = ["*"]\n{TEXT}')
