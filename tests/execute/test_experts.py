"""Stacks of experts: each expert's matrix is quantized as if it lay in the file by itself, or the stack stays whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

import w8a8
import w8a8.execute  # before the size of blocks is patched
from tests.checkpoints import write_checkpoint
from w8a8.checkpoint import Checkpoint, stream
from w8a8.errors import TensorSizeError
from w8a8.formats.arithmetic import round_to
from w8a8.plan.viewing import view_of
from w8a8.quantization import Options
from w8a8.sources import blocks
from w8a8.sources.rows import RowReader

EXPERTS, HIDDEN, INNER = 3, 40, 24
LAYER = "model.layers.0."
Array = NDArray[Any]

LAYOUTS = {
    # model_type -> where its experts lie in a layer
    "qwen3_vl_moe": "mlp.experts.",
    "gemma4_text": "experts.",
    "llama4_text": "feed_forward.experts.",
    "gpt_oss": "mlp.experts.",
    "granitemoe": "block_sparse_moe.",
}


QUANTIZED = [model_type for model_type in LAYOUTS if model_type != "gpt_oss"]  # vLLM takes its experts as stored alone


def matrices(seed: int = 0) -> dict[str, Array]:
    """Every expert's projections [out, in], by the names that engines load them by."""
    rng = np.random.default_rng(seed)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    return {
        f"{expert}.{leaf}": round_to(rng.standard_normal(shape, np.float32), "BF16")
        for expert in range(EXPERTS)
        for leaf, shape in shapes.items()
    }


def stored(model_type: str, values: dict[str, Array]) -> dict[str, tuple[str, Array]]:
    """The tensors that transformers saves for these experts."""
    prefix = LAYER + LAYOUTS[model_type]
    gates, ups, downs = (
        np.stack([values[f"{e}.{leaf}"] for e in range(EXPERTS)]) for leaf in ("gate_proj", "up_proj", "down_proj")
    )
    up = np.concatenate([gates, ups], 1)
    if model_type == "gpt_oss":
        up = np.stack([gates, ups], 2).reshape(EXPERTS, 2 * INNER, HIDDEN)
    if model_type in {"gpt_oss", "llama4_text"}:
        up, downs = up.transpose(0, 2, 1), downs.transpose(0, 2, 1)
    names = (
        ("input_linear.weight", "output_linear.weight") if model_type == "granitemoe" else ("gate_up_proj", "down_proj")
    )
    return {
        prefix + name: ("BF16", np.ascontiguousarray(value)) for name, value in zip(names, (up, downs), strict=True)
    }


def tensors_of(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_each_expert_is_read_by_its_rows(model_type: str, tmp_path: Path) -> None:
    values = matrices()
    write_checkpoint(tmp_path, stored(model_type, values), config={"model_type": model_type})
    seen = view_of(Checkpoint.open(tmp_path))
    prefix = LAYER + LAYOUTS[model_type] + ("experts." if model_type == "granitemoe" else "")
    assert seen.tensors.keys() == {f"{prefix}{name}.weight" for name in values}
    for name, matrix in values.items():
        assert np.array_equal(RowReader(tmp_path).values(seen.tensors[f"{prefix}{name}.weight"]), matrix), name


@pytest.mark.parametrize("turned", [False, True])
def test_qwen3_vl_moes_experts_are_read_whichever_way_they_are_stored(turned: bool, tmp_path: Path) -> None:
    values = matrices()
    held = stored("llama4_text" if turned else "qwen3_vl_moe", values)  # as transformers 4 saved them, and as 5 does
    held = {name.replace("feed_forward", "mlp"): value for name, value in held.items()}
    text = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER}
    write_checkpoint(tmp_path, held, config={"model_type": "qwen3_vl_moe", "text_config": text})
    seen = view_of(Checkpoint.open(tmp_path))
    for name, matrix in values.items():
        assert np.array_equal(RowReader(tmp_path).values(seen.tensors[f"{LAYER}mlp.experts.{name}.weight"]), matrix), (
            name
        )


@pytest.mark.parametrize("held", [0, 1 << 23])
@pytest.mark.parametrize("block", [256, 1 << 22])
@pytest.mark.parametrize("model_type", QUANTIZED)
def test_each_expert_is_quantized_by_its_rows(
    model_type: str, block: int, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", block)
    monkeypatch.setattr(blocks, "HELD_BYTES", held)
    values = matrices()
    write_checkpoint(tmp_path / "source", stored(model_type, values), config={"model_type": model_type})
    w8a8.quantize(tmp_path / "source", tmp_path / "out", Options("compressed-tensors"))
    made = tensors_of(tmp_path / "out")
    prefix = LAYER + LAYOUTS[model_type] + ("experts." if model_type == "granitemoe" else "")
    assert len(made) == 2 * len(values)
    for name, matrix in values.items():
        scale = np.abs(matrix).max(1, keepdims=True) / np.float32(127)
        assert np.array_equal(made[f"{prefix}{name}.weight_scale"].numpy(), scale), name
        assert np.array_equal(made[f"{prefix}{name}.weight"].numpy(), np.rint(matrix / scale).astype(np.int8)), name
    assert w8a8.verify(tmp_path / "out", tmp_path / "source").ok


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_experts_that_stay_are_the_stack_that_they_were(model_type: str, tmp_path: Path) -> None:
    attention = {f"{LAYER}self_attn.{leaf}_proj.weight": ("BF16", np.ones((16, 16), np.float32)) for leaf in "qkvo"}
    source = write_checkpoint(
        tmp_path / "source", attention | stored(model_type, matrices()), config={"model_type": model_type}
    )
    w8a8.quantize(source, tmp_path / "out", Options("compressed-tensors", exclude=["*.experts.*"]))
    before, made = tensors_of(source), tensors_of(tmp_path / "out")
    assert made.keys() == before.keys() | {f"{name}_scale" for name in attention}
    assert all(made[name].equal(value) for name, value in before.items() if name not in attention)
    assert w8a8.verify(tmp_path / "out", source).ok


@pytest.mark.parametrize(("shape", "reason"), [((2, 5, 4), "5 rows cannot be"), ((4097, 2, 1), "4096 experts at most")])
def test_a_stack_that_is_none_is_named(shape: tuple[int, ...], reason: str, tmp_path: Path) -> None:
    name = LAYER + "mlp.experts.gate_up_proj"
    write_checkpoint(
        tmp_path / "s", {name: ("BF16", np.ones(shape, np.float32))}, config={"model_type": "qwen3_vl_moe"}
    )
    with pytest.raises(TensorSizeError, match=f"{name} is .*{reason}"):
        w8a8.quantize(tmp_path / "s", tmp_path / "out")
