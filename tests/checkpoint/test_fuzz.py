"""Mutated headers and indexes: opening them succeeds, and then the safetensors library agrees, or raises `W8A8Error`.

Nothing else may come out, no message may be long, and no file may cost much more memory than it has bytes.
"""

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.checkpoint.files import raw_shard, split_shard
from tests.checkpoints import write_checkpoint
from w8a8.checkpoint import DTYPE_BYTES, Checkpoint
from w8a8.checkpoint.reader import INDEX
from w8a8.errors import W8A8Error

pytestmark = pytest.mark.slow

MAX_BYTES = 4 << 20
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Fuzz = Callable[[Callable[..., None]], Callable[..., None]]


def fuzz(examples: int) -> Fuzz:
    """The same examples every time; the folder is shared because each one rewrites what it changes."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=5),
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


sizes = st.one_of(
    st.integers(0, 300), st.sampled_from([2**k + d for k in (8, 31, 32, 53, 62, 63, 64, 200) for d in (-1, 0, 1)])
)
names = st.one_of(
    st.sampled_from(["a", "b", "c", "d", "__metadata__", "dtype", "shape", "data_offsets", "weight_map", ""]),
    st.text(max_size=5),
    st.sampled_from(
        [FIRST, SECOND, "../" + FIRST, "/" + FIRST, "./" + FIRST, "x" * 300 + ".safetensors", "config.json"]
    ),
)
scalars = st.one_of(
    st.none(), st.booleans(), sizes, sizes.map(lambda n: -n), st.floats(), names, st.sampled_from(sorted(DTYPE_BYTES))
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tensors in two shards, with metadata."""
    bits = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {"a": ("F32", bits), "b": ("BF16", bits), "c": ("F16", bits[0]), "d": ("BF16", bits[:, :0])}
    return write_checkpoint(tmp_path_factory.mktemp("fuzz") / "pristine", tensors, shards=2)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "mutated"))


def check(folder: Path) -> None:
    tracemalloc.start()
    try:
        checkpoint, refusal = Checkpoint.open(folder), ""
    except W8A8Error as error:
        checkpoint, refusal = None, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MAX_BYTES
    assert len(refusal) < 2000
    if checkpoint is not None:
        assert_the_library_agrees(checkpoint)


def assert_the_library_agrees(checkpoint: Checkpoint) -> None:
    found: dict[str, tuple[str, list[int]]] = {}
    for shard in checkpoint.shards:
        with safe_open(checkpoint.path / shard.name, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                view = file.get_slice(name)
                found[name] = view.get_dtype(), view.get_shape()
    assert found == {t.name: (t.dtype, list(t.shape)) for t in checkpoint.tensors.values()}


def mutate_json(draw: st.DrawFn, value: Any) -> Any:
    """Replace, remove, rename or add something at a random depth."""
    if not isinstance(value, dict) or not value:
        return draw(values)
    children = dict(value)
    key = draw(st.sampled_from(sorted(value)))
    child = children.pop(key)
    action = draw(st.sampled_from([*["descend"] * 5, "replace", "remove", "rename", "add"]))
    if action == "descend":
        children[key] = mutate_json(draw, child)
    elif action == "replace":
        children[key] = draw(values)
    elif action != "remove":
        children[draw(names)] = child
    return {**value, **children} if action == "add" else children


@st.composite
def mutated_json(draw: st.DrawFn, text: bytes) -> bytes:
    """JSON after one to three mutations."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        value = mutate_json(draw, value)
    return json.dumps(value).encode()


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some bits flipped, some inserted, or the end cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        changed[draw(st.integers(0, len(changed) - 1))] ^= 1 << draw(st.integers(0, 7))
    at = draw(st.integers(0, len(changed)))
    changed[at:at] = draw(st.binary(max_size=3))
    return bytes(changed[: draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))])


@fuzz(400)
@given(data=st.data())
def test_a_shard_of_mutated_bytes(folder: Path, pristine: Path, data: st.DataObject) -> None:
    (folder / FIRST).write_bytes(data.draw(mutated_bytes((pristine / FIRST).read_bytes())))

    check(folder)


@fuzz(300)
@given(length=st.one_of(st.integers(0, 400), st.integers(0, 2**64 - 1)), extra=st.binary(max_size=16))
@example(length=2**64 - 1, extra=b"")
def test_a_shard_that_claims_another_header_length(folder: Path, pristine: Path, length: int, extra: bytes) -> None:
    raw_shard(folder / FIRST, (pristine / FIRST).read_bytes()[8:], extra, length)

    check(folder)


@fuzz(800)
@given(data=st.data())
def test_a_shard_of_mutated_header_json(folder: Path, pristine: Path, data: st.DataObject) -> None:
    header, body = split_shard((pristine / FIRST).read_bytes())
    raw_shard(folder / FIRST, data.draw(mutated_json(header)), body)

    check(folder)


@fuzz(400)
@given(dtypes=st.lists(st.sampled_from(sorted(DTYPE_BYTES)), max_size=3), shape=st.lists(sizes, max_size=3), gap=sizes)
def test_a_shard_of_tensors_of_any_shape(folder: Path, dtypes: list[str], shape: list[int], gap: int) -> None:
    entries: dict[str, Any] = {}
    end = 0
    for name, dtype in zip("ac?", dtypes, strict=False):
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw_shard(folder / FIRST, entries, bytes(min(end, 1 << 16) + (gap if gap < 3 else 0)))
    weight_map = dict.fromkeys(entries, FIRST) | dict.fromkeys("bd", SECOND)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    check(folder)


@fuzz(600)
@given(data=st.data())
def test_an_index_of_mutated_json(folder: Path, pristine: Path, data: st.DataObject) -> None:
    (folder / INDEX).write_bytes(data.draw(mutated_json((pristine / INDEX).read_bytes())))

    check(folder)


@fuzz(300)
@given(data=st.data(), name=st.sampled_from([INDEX, "config.json"]))
def test_json_of_mutated_bytes(folder: Path, pristine: Path, data: st.DataObject, name: str) -> None:
    for file in (INDEX, "config.json"):
        shutil.copy(pristine / file, folder / file)
    (folder / name).write_bytes(data.draw(mutated_bytes((pristine / name).read_bytes())))

    check(folder)
