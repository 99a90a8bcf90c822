import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from tests.checkpoints import LLAMA, Array, folder_bytes, tensor_bytes, write_checkpoint, write_shard
from tests.execute.runs import names
from w8a8 import quantize
from w8a8.checkpoint import Checkpoint, stream
from w8a8.checkpoint.header import write_header
from w8a8.errors import NonFiniteWeightError, SourceChangedError, UnreadableError
from w8a8.execute.shard import ShardJob, ShardRecord, quantize_shard
from w8a8.formats import COMPATS, get_format
from w8a8.formats.arithmetic import EXACT, round_to
from w8a8.plan import ShardPlan
from w8a8.plan.layout import ScaleSpec, lay_out
from w8a8.plan.viewing import view_of
from w8a8.sources.view import ViewShard

Tensors = dict[str, tuple[str, Array]]

NUMPY = {"I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}
FLOATS = ("BF16", "F16", "F32")

shapes = st.one_of(
    st.just(()), st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), st.just((1, 1)), st.just((2, 40))
)


@st.composite
def copies(draw: st.DrawFn) -> tuple[str, Array]:
    """A tensor to be copied: any dtype and shape."""
    dtype, shape = draw(st.sampled_from([*FLOATS, *NUMPY])), draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    if dtype in FLOATS:
        return dtype, rng.standard_normal(shape).astype(np.float32)
    return dtype, rng.integers(0, 2, shape).astype(NUMPY[dtype])


@st.composite
def weights(draw: st.DrawFn) -> tuple[str, Array]:
    """A matrix to be quantized, some of its rows zero, of a value that its dtype can hold."""
    dtype, rows, columns = draw(st.sampled_from(FLOATS)), draw(st.integers(1, 20)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    values[rng.random(rows) < 0.2] = 0
    return dtype, round_to(values, dtype)


@st.composite
def checkpoints(draw: st.DrawFn) -> Tensors:
    """Weights and copies in any order, at least one weight."""
    chosen = {f"extra.{i}": copy for i, copy in enumerate(draw(st.lists(copies(), max_size=6)))}
    for i, weight in enumerate(draw(st.lists(weights(), min_size=1, max_size=4))):
        chosen[f"model.layers.{i}.self_attn.o_proj.weight"] = weight
    return dict(draw(st.permutations(list(chosen.items()))))


def reference(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes and scales as plainly as NumPy can say them."""
    amax = np.abs(weight).max(axis=1)
    scales = np.where(amax == 0, np.float32(1), amax / np.float32(127)).astype(np.float32)
    return np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8), scales


def read_with_torch(folder: Path) -> dict[str, "torch.Tensor"]:
    """Every tensor of every shard, read as an engine reads it."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    return tensors


def raw(tensor: "torch.Tensor") -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def one_shard(folder: Path, tensors: Tensors) -> tuple[Path, ViewShard, ShardPlan]:
    """A file of `tensors` and the plan to quantize every `.weight` of it."""
    path = folder / "model.safetensors"
    write_shard(path, tensors)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (shard,) = view_of(Checkpoint.open(folder)).shards
    return path, shard, lay_out(shard.name, shard.tensors, scales_of(shard))


def scales_of(shard: ViewShard) -> dict[str, ScaleSpec]:
    weights = [tensor for tensor in shard.tensors if tensor.name.endswith(".weight")]
    return {t.name: ScaleSpec(f"{t.name}_scale", "F32", (t.shape[0],)) for t in weights}


def run_shard(
    source: Path, shard: ViewShard, plan: ShardPlan, target: Path, advance: Callable[[int], None] = lambda _: None
) -> ShardRecord:
    header = write_header(((w.name, w.dtype, w.shape, w.begin, w.end) for w in plan.writes), {})
    return quantize_shard(ShardJob(source, shard, plan, header, target, EXACT, hashed=True), advance=advance)


@settings(max_examples=150, deadline=None)
@given(checkpoints(), st.integers(1, 3), st.sampled_from([16, 64, 256, 1 << 20]), st.integers(1, 3), st.booleans())
def test_any_checkpoint_becomes_what_plain_numpy_says(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, shards: int, block: int, workers: int, hashed: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = write_checkpoint(folder / "source", tensors, shards=min(shards, len(tensors)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK_BYTES", block)
        quantize(source, folder / "out", workers=workers, hash_source=hashed)

    found = read_with_torch(folder / "out")
    expected: dict[str, tuple[tuple[int, ...], bytes]] = {}
    for name, (dtype, values) in tensors.items():
        if name.endswith(".weight"):
            codes, scales = reference(values)
            assert found[name].dtype == torch.int8
            assert found[f"{name}_scale"].dtype == torch.float32
            expected |= {name: (values.shape, codes.tobytes()), f"{name}_scale": ((len(scales),), scales.tobytes())}
        else:
            expected[name] = (values.shape, tensor_bytes(values, dtype))
    assert {name: (tuple(tensor.shape), raw(tensor)) for name, tensor in found.items()} == expected

    provenance = json.loads((folder / "out" / "w8a8.json").read_text())
    files = source.glob("*.safetensors") if hashed else ()
    assert provenance["source"]["sha256"] == {file.name: sha256(file) for file in files}
    assert provenance["shards"] == {
        f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in (folder / "out").glob("*.safetensors")
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_shard_without_tensors_gives_one_without_tensors(tmp_path: Path) -> None:
    source, shard, plan = one_shard(tmp_path, {})
    record = run_shard(source, shard, plan, tmp_path / "target")
    with safe_open(tmp_path / "target", framework="pt") as file:
        assert list(file.keys()) == []
    assert record.source_sha256 == sha256(source)


def test_what_a_tensor_becomes_does_not_depend_on_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tensors: Tensors = {
        "w.weight": ("BF16", rng.standard_normal((33, 100), np.float32)),
        "u": ("U8", np.arange(99, dtype=np.uint8)),
    }
    results = set()
    for block in (1, 200, 1000, 1 << 22):
        monkeypatch.setattr(stream, "BLOCK_BYTES", block)
        source, shard, plan = one_shard(tmp_path, tensors)
        results.add(run_shard(source, shard, plan, tmp_path / "target").sha256)
    assert len(results) == 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_a_weight_that_is_not_finite_is_named_with_its_row(tmp_path: Path, dtype: str, value: float, kind: str) -> None:
    values = np.ones((30, 8), np.float32)
    values[17, 3] = value
    before: tuple[str, Array] = (dtype, np.ones((2, 8), np.float32))
    source, shard, plan = one_shard(tmp_path, {"a.weight": before, "w.weight": (dtype, values)})
    with pytest.raises(NonFiniteWeightError, match=rf"w\.weight has {kind} in row 17.*--exclude 'w\.weight'"):
        run_shard(source, shard, plan, tmp_path / "target")


def test_a_copy_that_is_not_finite_is_nobodys_business(tmp_path: Path) -> None:
    values = np.full((3, 3), np.nan, np.float32)
    source, shard, plan = one_shard(tmp_path, {"mask": ("F32", values)})
    run_shard(source, shard, plan, tmp_path / "target")
    with safe_open(tmp_path / "target", framework="np") as file:
        assert np.isnan(file.get_tensor("mask")).all()


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    """Change one byte, size as before."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


def exchange(path: Path) -> None:
    """Put another file in its place, size and time as before."""
    new, status = path.with_suffix(".new"), path.stat()
    new.write_bytes(path.read_bytes())
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(path)


@pytest.mark.parametrize("change", [shorten, rewrite, exchange])
@pytest.mark.parametrize("block", [1024, 1 << 22])
def test_a_source_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], block: int
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", block)
    source, shard, plan = one_shard(tmp_path, {"w.weight": ("BF16", np.ones((64, 512), np.float32))})
    changed = threading.Event()

    def advance(_count: int) -> None:
        if not changed.is_set():
            changed.set()
            change(source)

    with pytest.raises(SourceChangedError, match=r"while (being|it was being) read"):
        run_shard(source, shard, plan, tmp_path / "target", advance)


@pytest.mark.parametrize("columns", [512, 256])
def test_a_source_that_changed_since_its_header_was_read_is_noticed(tmp_path: Path, columns: int) -> None:
    source, shard, plan = one_shard(tmp_path, {"w.weight": ("BF16", np.ones((64, 512), np.float32))})
    rows = 64 * 512 // columns  # another shape, whether or not the file's size tells
    write_shard(source, {"w.weight": ("BF16", np.ones((rows + (columns == 512), columns), np.float32))})
    with pytest.raises(SourceChangedError, match="since its header was read"):
        run_shard(source, shard, plan, tmp_path / "target")


def test_a_source_that_went_away_is_unreadable(tmp_path: Path) -> None:
    source, shard, plan = one_shard(tmp_path, {"w.weight": ("BF16", np.ones((2, 2), np.float32))})
    source.unlink()
    with pytest.raises(UnreadableError, match="No such file"):
        run_shard(source, shard, plan, tmp_path / "target")


def test_a_failed_run_leaves_out_absent_and_its_source_alone(tmp_path: Path) -> None:
    values = np.full((4, 4), np.nan, np.float32)
    source = write_checkpoint(tmp_path / "source", {"model.layers.0.mlp.down_proj.weight": ("BF16", values)})
    before = folder_bytes(source)
    with pytest.raises(NonFiniteWeightError):
        quantize(source, tmp_path / "out")
    assert names(tmp_path) == ["source"]
    assert folder_bytes(source) == before


CARRY_OUT = "import pickle, sys; from w8a8.execute.shard import quantize_shard; \
print(quantize_shard(pickle.load(sys.stdin.buffer)).sha256)"


@pytest.mark.parametrize("compat", [None, *COMPATS])
def test_a_job_is_a_value_that_another_process_carries_out_alike(tmp_path: Path, compat: str | None) -> None:
    values = np.linspace(-1, 1, 64 * 512, dtype=np.float32).reshape(64, 512)
    source, shard, _ = one_shard(tmp_path, {"w.weight": ("BF16", values)})
    plan = lay_out(shard.name, shard.tensors, scales_of(shard))
    header = write_header(((w.name, w.dtype, w.shape, w.begin, w.end) for w in plan.writes), {})
    job = ShardJob(source, shard, plan, header, tmp_path / "here", get_format(compat=compat).arithmetic)
    here = quantize_shard(job)
    there = replace(job, target=tmp_path / "there")
    run = subprocess.run([sys.executable, "-c", CARRY_OUT], input=pickle.dumps(there), capture_output=True, check=True)
    assert run.stdout.decode().strip() == here.sha256
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
