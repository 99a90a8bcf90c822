"""`architectures.toml` is read strictly, and what it names is there in real models."""

import re
from collections import defaultdict
from collections.abc import Mapping
from importlib.resources import files

import pytest

from tests.named import NAMES, Family
from w8a8.memory.model import layer_of
from w8a8.plan import architecture_of, architectures, module_name
from w8a8.plan.architectures import EACH, Architecture, known, read
from w8a8.plan.viewing import view_of
from w8a8.recipes.groups import groups_of
from w8a8.runtime.fitting import PARTS
from w8a8.sources.experts import Stack

TEXT = files("w8a8.plan").joinpath("architectures.toml").read_text(encoding="utf-8")
SMALL = 'model_types = ["new"]\nfused = []\nquantize.mlp = []\n'
KINDS = "kind is one of norm, linear, value where there is a producer, else absent"
GROUPED = [name for name in NAMES if architecture_of(Family.load(name).checkpoint.config).groups]


def added(table: str) -> Architecture:
    """A table put behind those that there are."""
    return read(f"{TEXT}\n[architecture.new]\n{table}")["new"]


class Layer:
    """The modules of a decoder layer by their paths in a model, and whether they are to be quantized."""

    def __init__(self, quantized: Mapping[str, bool]) -> None:
        self.quantized = quantized

    def named_modules(self) -> list[tuple[str, None]]:
        return [(path, None) for path in self.quantized]


EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+)")


def path_of(name: str, model_type: str) -> str:
    """Where transformers has a module, once experts lie one by one, by its name in the file."""
    if found := EXPERT.fullmatch(name):
        name = f"{found[1]}.{PARTS.get(found[3], found[3])}.{found[2]}"
    return (
        name.replace("block_sparse_moe", "mlp") if model_type == "mixtral" else name.replace("router.layer", "router")
    )


def layers(family: Family) -> list[Layer]:
    """The decoder layers of a recorded model."""
    found: dict[int, dict[str, bool]] = defaultdict(dict)
    for name in view_of(family.checkpoint).tensors:
        place = layer_of(name)
        if place and not any(part in name for part in ("vision", "visual", "audio", "mtp")):
            path = path_of(module_name(place[1]), family.checkpoint.config["model_type"])
            found[place[0]][path] = name in family.quantized
    return list(map(Layer, found.values()))


@pytest.mark.parametrize("name", GROUPED)
def test_every_group_is_there_in_a_real_model_and_its_consumers_are_quantized(name: str) -> None:
    family = Family.load(name)
    for layer in layers(family):
        for group in groups_of(family.checkpoint.config, layer):
            assert all(layer.quantized[path] for path in group.consumers)
            assert not any(layer.quantized[path] for path in group.readers)
            assert group.producer is None or group.producer in layer.quantized
            assert (group.kind == "norm") == (group.producer is not None and not layer.quantized[group.producer])


@pytest.mark.parametrize(
    "name", sorted({architecture_of(Family.load(name).checkpoint.config).name for name in GROUPED})
)
def test_whatever_a_table_names_is_there_in_some_real_model(name: str) -> None:
    families = [
        family for family in map(Family.load, GROUPED) if architecture_of(family.checkpoint.config).name == name
    ]
    there = {path for family in families for layer in layers(family) for path in layer.quantized}
    for group in known()[name].groups:
        for path in (*group.consumers, *group.readers, *filter(None, [group.producer])):
            assert path.replace(EACH, "0") in there, path


@pytest.mark.parametrize("name", GROUPED)
def test_the_groups_hold_every_quantized_layer_once_and_those_that_engines_fuse_together(name: str) -> None:
    family = Family.load(name)
    for layer in layers(family):
        groups = groups_of(family.checkpoint.config, layer)
        consumers = [path for group in groups for path in group.consumers]
        assert len(consumers) == len(set(consumers))
        assert {path for path, quantized in layer.quantized.items() if quantized} == set(consumers)
        for fused in architecture_of(family.checkpoint.config).fused:
            homes = {
                (group.name, path.rpartition(".")[0])
                for group in groups
                for path in group.consumers
                if path.rpartition(".")[2] in fused
            }
            assert len(homes) == len({place for _, place in homes})


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
