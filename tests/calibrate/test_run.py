"""`quantize --recipe`: the result is what was simulated, is the same after an interruption, and is checked before."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec import filesystem
from transformers import AutoModelForCausalLM, AutoTokenizer

import w8a8
from tests.calibrate.checkpoints import KINDS, make, write_text
from tests.checkpoints import folder_bytes
from tests.command import W8A8, cli
from w8a8.calibrate.activations import Activations
from w8a8.checkpoint import Checkpoint
from w8a8.errors import DiskFullError, NonFiniteWeightError, TargetExistsError, UsageError
from w8a8.inspection import inspect
from w8a8.quantization import Options, calibrated, prepare, run
from w8a8.runtime import W8A8Linear
from w8a8.texts.samples import cut, load

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {"samples": 9, "tokens": 48}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads only wait for each other in models as small as these."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@contextmanager
def stopping(after: int, layers: int, of: int = 3) -> Iterator[Callable[[int], None]]:
    """Progress that is interrupted once `after` layers are done of the step that has `of`."""
    counted = []

    def done(count: int) -> None:
        counted.append(count)
        if layers == of and sum(counted) == after:
            raise KeyboardInterrupt

    assert layers in (3, 6)
    yield done


def states_after(out: Path, sample: tuple[int, ...]) -> Any:
    """What leaves the last layer of the finished model, run in float32."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert any(isinstance(module, W8A8Linear) for module in model.modules())
    found = []
    model.model.layers[-1].register_forward_hook(lambda _m, _i, out: found.append(out))
    with torch.no_grad():
        model(input_ids=torch.tensor([sample]), use_cache=False)
    return found[0].numpy()


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("Llama", "smooth"),
        ("Llama", "smooth+gptq"),
        ("Qwen2", "rotate+smooth+gptq"),
        *((kind, "auto") for kind in KINDS),
    ],
)
def test_the_result_runs_as_it_was_simulated(kind: str, recipe: str, text: Path, tmp_path: Path) -> None:
    source, out = make(tmp_path / "model", kind), tmp_path / "out"
    job = prepare(source, Options(recipe=recipe, calibration=str(text), **SIZES))
    with calibrated(job, out) as ready:
        [states] = (tmp_path / ".out.w8a8-calibration").rglob("states-00003.bin")
        simulated = [each.hidden[0].numpy() for each in Activations(states).states(torch.device("cpu"))]
        run(ready, out)
    assert not (tmp_path / ".out.w8a8-calibration").exists()
    sample = cut(load(str(text)), AutoTokenizer.from_pretrained(source), **SIZES)[4]
    found = states_after(out, sample)[0]
    assert np.allclose(found, simulated[4], rtol=1e-3, atol=1e-3 * np.abs(found).max())
    assert w8a8.verify(out, source).ok


def test_formats_hold_the_same_codes_and_say_how_they_were_made(source: Path, text: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("quark", "compressed-tensors")]
    for out in outs:
        w8a8.quantize(source, out, Options(format=out.name, recipe="smooth", calibration=str(text), **SIZES))
    one, other = map(Checkpoint.open, outs)
    for name, tensor in one.tensors.items():
        twin = other.tensors[name]
        assert (one.path / tensor.shard).read_bytes()[tensor.offset :][: tensor.nbytes] == (
            other.path / twin.shard
        ).read_bytes()[twin.offset :][: twin.nbytes]
    record = json.loads((outs[0] / "w8a8.json").read_text())
    assert record["recipe"] == "smooth"
    assert record["calibration"]["text"]["name"] == "miller.txt"
    assert (record["calibration"]["samples"], record["calibration"]["tokens"]) == (9, 48)
    assert inspect(outs[0]).recipe.startswith("smooth, on 9 x 48 tokens of miller.txt")


@pytest.mark.parametrize("after", [1, 2])
def test_interrupted_it_goes_on_with_the_next_layer(source: Path, text: Path, tmp_path: Path, after: int) -> None:
    options: dict[str, Any] = {"recipe": "smooth+gptq", "calibration": str(text), **SIZES}
    w8a8.quantize(source, tmp_path / "whole", Options(**options))
    job, out = prepare(source, Options(**options)), tmp_path / "out"
    with (
        pytest.raises(KeyboardInterrupt),
        calibrated(job, out, progress=lambda layers: stopping(after, layers)),
    ):
        pass
    home = tmp_path / ".out.w8a8-calibration" / "first"
    assert sorted(path.name for path in home.iterdir())[-1] == f"states-{after:05}.bin"
    assert sorted(path.name for path in home.parent.iterdir()) == ["costs.safetensors", "first"]
    (home / f"layer-{after:05}.safetensors").write_bytes(b"half of a lay")
    (home / f"states-{after + 1:05}.bin").write_bytes(b"half of the states")
    said: list[str] = []
    w8a8.quantize(source, out, Options(**options), notice=said.append)
    assert f"resuming: {after} of 3 layers are calibrated already" in said
    assert not any(line.startswith("measuring") for line in said)
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("after", [2, 4])
def test_interrupted_while_costs_are_measured_it_measures_them_again(
    source: Path, text: Path, tmp_path: Path, after: int
) -> None:
    options: dict[str, Any] = {"recipe": "smooth", "calibration": str(text), **SIZES}
    job, out = prepare(source, Options(**options)), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), calibrated(job, out, progress=lambda layers: stopping(after, layers, of=6)):
        pass
    (tmp_path / ".out.w8a8-calibration" / "costs.safetensors").write_bytes(b"half of the cos")
    w8a8.quantize(source, out, Options(**options))
    w8a8.quantize(source, tmp_path / "whole", Options(**options))
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


def test_another_text_starts_over(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = prepare(source, Options(calibration=str(text), **SIZES))
    with pytest.raises(KeyboardInterrupt), calibrated(job, out, progress=lambda layers: stopping(1, layers)):
        pass
    text.write_text(text.read_text().replace("miller", "farmer"))
    said: list[str] = []
    w8a8.quantize(source, out, Options(calibration=str(text), **SIZES), notice=said.append)
    assert not any("resuming" in sentence for sentence in said)


def test_killed_it_goes_on_to_the_same_result(text: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "deep", num_hidden_layers=8)
    options = ["--recipe", "smooth", "--calibration", str(text), "--samples", "9", "--tokens", "48", "--quiet"]
    arguments: list[str | Path] = ["quantize", source, tmp_path / "out", *options]
    work = subprocess.Popen([*W8A8, *arguments])
    journal = tmp_path / ".out.w8a8-calibration" / "first" / "journal.jsonl"
    while not journal.exists() or journal.read_text().count("\n") < 3:
        assert work.poll() is None
        time.sleep(0.01)
    work.send_signal(signal.SIGKILL)
    work.wait()
    assert not (tmp_path / "out").exists()
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    w8a8.quantize(source, tmp_path / "whole", Options(recipe="smooth", calibration=str(text), **SIZES))
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_layers_left_out_stay_as_they_are(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    w8a8.quantize(
        source, out, Options(calibration=str(text), exclude=["*.layers.1.*", "*.layers.2.mlp.down_proj"], **SIZES)
    )
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    kept = [name for name in before.tensors if ".layers.1." in name or name.endswith("2.mlp.down_proj.weight")]
    for name in kept:
        tensor, twin = before.tensors[name], after.tensors[name]
        assert (source / tensor.shard).read_bytes()[tensor.offset :][: tensor.nbytes] == (
            out / twin.shard
        ).read_bytes()[twin.offset :][: twin.nbytes]
    assert w8a8.verify(out, source).ok


@pytest.mark.parametrize("recipe", ["smooth", "rotate+smooth+gptq"])
def test_a_result_is_verified_against_a_source_that_is_far_away(
    recipe: str, source: Path, text: Path, tmp_path: Path
) -> None:
    w8a8.quantize(source, tmp_path / "out", Options(recipe=recipe, calibration=str(text), **SIZES))
    far = filesystem("memory")
    for path in source.iterdir():
        far.pipe_file(f"/far/{path.name}", path.read_bytes())
    result = w8a8.verify(tmp_path / "out", "memory://far")
    assert result.ok, result.problems
    assert result.folded > 0
    far.rm("/far", recursive=True)


def test_a_budget_keeps_whole_groups_in_bf16(source: Path, text: Path, tmp_path: Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    options: dict[str, Any] = {"recipe": "smooth", "calibration": str(text), **SIZES}
    w8a8.quantize(source, plain, Options(**options))
    result = w8a8.quantize(source, out, Options(**options, keep_bf16="10%"))
    kept = [d for d in result.plan.decisions if d.reason.startswith("--keep-bf16")]
    assert kept
    assert {d.tensor.name.removesuffix(".weight") for d in kept} <= set(result.plan.exclude)
    grown = Checkpoint.open(out).nbytes / Checkpoint.open(plain).nbytes
    assert 1 < grown <= 1.1
    assert w8a8.verify(out, source).ok
    assert json.loads((out / "w8a8.json").read_text())["calibration"]["kept"]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "magic"}, "unknown recipe 'magic'; there are rtn, smooth, smooth.gptq, rotate.smooth.gptq, auto"),
        ({"recipe": "rtn", "calibration": "t"}, "--calibration needs a recipe"),
        ({"keep_bf16": "2%"}, "--keep-bf16 needs a recipe"),
        ({"recipe": "auto", "keep_bf16": "101%"}, "up to 100%"),
        ({"recipe": "auto", "keep_bf16": "0%"}, "over 0%"),
        ({"recipe": "auto", "keep_bf16": "much"}, "'much'"),
        ({"recipe": "auto", "compat": "quark-0.13"}, "--compat"),
        ({"recipe": "auto", "samples": 1}, "at least 2"),
    ],
)
def test_impossible_options_are_refused(source: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(source, Options(**options))


def test_a_text_is_what_makes_a_recipe_the_default(source: Path, text: Path) -> None:
    assert prepare(source).plan.recipe == "rtn"
    assert prepare(source, Options(calibration=str(text))).plan.recipe == "auto"


def test_texts_and_models_that_do_not_go_together_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="too few for 2 samples"):
        w8a8.quantize(source, out, Options(calibration=str(tmp_path / "empty.txt"), tokens=64))
    with pytest.raises(UsageError, match="256 tokens at most"):
        w8a8.quantize(source, out, Options(recipe="auto", tokens=257))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "llama"]


def test_a_target_that_is_there_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(TargetExistsError):
        w8a8.quantize(source, tmp_path / "out", Options(recipe="auto", tokens=257))


def test_a_weight_that_is_no_number_is_named(source: Path, text: Path, tmp_path: Path) -> None:
    tensor = Checkpoint.open(source).tensors["model.layers.1.mlp.up_proj.weight"]
    with (source / tensor.shard).open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff\xff")
    with pytest.raises(NonFiniteWeightError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        w8a8.quantize(source, tmp_path / "out", Options(calibration=str(text), **SIZES))


def test_a_disk_too_small_is_known_before_the_work(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(DiskFullError, match="calibrating needs"):
        w8a8.quantize(source, tmp_path / "out", Options(calibration=str(text), **SIZES))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "miller.txt"]


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_calibrates_on_and_what_it_gained(source: Path, tmp_path: Path) -> None:
    done = cli("quantize", source, tmp_path / "out", "--recipe", "auto", "--tokens", "64")
    assert done.returncode == 0, done.stderr
    assert "using the small built-in text" in done.stderr
    assert "64 samples of 64 tokens, built-in text, on cpu" in done.stderr
    shown = cli("inspect", tmp_path / "out")
    assert "recipe auto, on 64 x 64 tokens of built-in text" in shown.stdout.replace("\n", " ")
