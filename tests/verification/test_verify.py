"""verify passes what is right and names what is not: one kind of damage per test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import w8a8
from tests.checkpoint.files import edit_json
from tests.checkpoints import LLAMA, Array, llama_tensors, read_tensor, write_checkpoint, write_shard
from w8a8.checkpoint import Checkpoint, TensorSpec, read_header
from w8a8.errors import UnreadableError, W8A8Error
from w8a8.execute import execute
from w8a8.execute.shard import Finished
from w8a8.formats import Selection, quark
from w8a8.formats.arithmetic import decode, round_to
from w8a8.formats.provenance import CalibrationRecord
from w8a8.plan import make_plan
from w8a8.quantization import Options, prepare
from w8a8.verification import run as verification

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def made(llama: Path, tmp_path: Path) -> Path:
    w8a8.quantize(llama, tmp_path / "out", hash_source=True)
    return tmp_path / "out"


def spec(folder: Path, name: str) -> TensorSpec:
    return Checkpoint.open(folder).tensors[name]


def patch(folder: Path, tensor: TensorSpec, change: Callable[[bytes], bytes]) -> None:
    """Replace a tensor's bytes in place."""
    path = folder / tensor.shard
    data = bytearray(path.read_bytes())
    data[tensor.offset : tensor.offset + tensor.nbytes] = change(bytes(data[tensor.offset :][: tensor.nbytes]))
    path.write_bytes(data)


def forget_checksums(folder: Path) -> None:
    """Remove the provenance, so that only the content itself can tell."""
    (folder / "w8a8.json").unlink()


def test_a_fresh_result_passes_with_all_checksums(llama: Path, made: Path) -> None:
    result = w8a8.verify(made, llama)
    assert result.ok, result.problems
    assert result.checksums == 4
    assert result.copied == 2 + 2 * 2
    assert len(result.tensors) == 2 * 7
    assert result.warnings == ()


@pytest.mark.parametrize("compat", ["quark-0.11", "quark-0.13", "llm-compressor-0.14"])
def test_results_in_other_tools_arithmetic_pass(llama: Path, tmp_path: Path, compat: str) -> None:
    w8a8.quantize(llama, tmp_path / "out", Options(compat=compat))
    assert w8a8.verify(tmp_path / "out", llama).ok


@pytest.mark.parametrize("tool", ["quark-0.11.2", "quark-0.13", "llmcompressor-0.14.0.1"])
def test_what_other_tools_wrote_passes_without_checksums(golden: Path, tool: str) -> None:
    result = w8a8.verify(golden / tool, golden / "source")
    assert result.ok, result.problems
    assert result.checksums == 0
    assert "no w8a8.json" in result.verdict


def test_a_layer_that_quark_forgot_to_exclude_is_a_warning(golden: Path) -> None:
    warnings = w8a8.verify(golden / "quark-0.13", golden / "source").warnings
    assert any("embed_vision.embedding_projection" in warning for warning in warnings)


@pytest.mark.parametrize(
    "entry",
    [
        {"quantization_config": None},
        {"quantization_config": {}},
        {"compression_config": None},
        {"text_config": {"quantization_config": None, "compression_config": {}, "hidden_size": 64}},
        {"thinker_config": {"text_config": {"quantization_config": {}}}},
    ],
)
def test_entries_that_declare_nothing_do_not_stay_in_the_result(llama: Path, tmp_path: Path, entry: Any) -> None:
    edit_json(llama / "config.json", lambda config: config.update(entry))
    assert w8a8.inspect(llama).scheme == "not quantized"
    w8a8.quantize(llama, tmp_path / "out")
    assert w8a8.verify(tmp_path / "out", llama).problems == ()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "INT8 W8A8" in w8a8.inspect(tmp_path / "out").scheme
    del written["quantization_config"]
    assert "quantization_config" not in json.dumps(written)
    assert "compression_config" not in json.dumps(written)


def test_a_scheme_that_was_put_into_a_section_of_the_config_is_named(llama: Path, made: Path) -> None:
    entry = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    edit_json(made / "config.json", lambda config: config.update(entry))
    assert w8a8.verify(made, llama).problems == ("config.json: differs from the source's in text_config",)


def test_sqnr_and_error_are_those_of_a_plain_computation(llama: Path, made: Path) -> None:
    source, out = Checkpoint.open(llama), Checkpoint.open(made)
    bits = np.frombuffer(read_tensor(source, source.tensors[Q_PROJ]), np.uint16).astype(np.uint32) << 16
    w = bits.view(np.float32).reshape(64, 64).astype(np.float64)
    codes = np.frombuffer(read_tensor(out, out.tensors[Q_PROJ]), np.int8).reshape(64, 64)
    scale = np.frombuffer(read_tensor(out, out.tensors[f"{Q_PROJ}_scale"]), np.float32)[:, None]
    error = w - codes * scale.astype(np.float64)
    found = next(t for t in w8a8.verify(made, llama).tensors if t.name == Q_PROJ)
    assert found.sqnr_db == pytest.approx(10 * np.log10((w**2).sum() / (error**2).sum()), abs=1e-4)
    assert found.max_error == pytest.approx((np.abs(error) / scale).max(), rel=1e-4)
    assert found.saturated == np.count_nonzero(np.abs(codes.astype(int)) == 127)
    assert found.zeroed_rows == 0


def test_zeroed_rows_are_counted(golden: Path) -> None:
    zeroed = {t.name: t.zeroed_rows for t in w8a8.verify(golden / "quark-0.13", golden / "source").tensors}
    assert sum(zeroed.values()) > 0


def test_our_scales_zero_no_row_that_quark_zeroes(golden: Path, tmp_path: Path) -> None:
    w8a8.quantize(golden / "source", tmp_path / "out")
    assert sum(t.zeroed_rows for t in w8a8.verify(tmp_path / "out", golden / "source").tensors) == 0


def test_one_flipped_bit_in_a_code_fails_our_own_result(llama: Path, made: Path) -> None:
    patch(made, spec(made, Q_PROJ), lambda data: bytes([data[0] ^ 2]) + data[1:])
    problems = w8a8.verify(made, llama).problems
    assert any("scales away" in p and Q_PROJ in p for p in problems)
    assert any("SHA-256" in p for p in problems)


def test_one_flipped_bit_in_a_copy_is_found_without_checksums(llama: Path, made: Path) -> None:
    patch(made, spec(made, "lm_head.weight"), lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    forget_checksums(made)
    assert w8a8.verify(made, llama).problems == ("lm_head.weight: copied, but not bit for bit",)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_a_scale_that_is_not_finite_and_positive_is_found(llama: Path, made: Path, value: float) -> None:
    patch(made, spec(made, f"{Q_PROJ}_scale"), lambda data: np.float32(value).tobytes() + data[4:])
    forget_checksums(made)
    assert any("scales are not finite and positive" in p for p in w8a8.verify(made, llama).problems)


def test_another_source_is_found(llama: Path, made: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", llama_tensors(seed=1), shards=2)
    problems = w8a8.verify(made, other).problems
    assert any("is not the file this was made from" in p for p in problems)
    assert any("not bit for bit" in p for p in problems)


def test_missing_extra_and_reshaped_tensors_are_found(made: Path, tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["model.extra.weight"] = tensors["lm_head.weight"]
    tensors["model.norm.weight"] = ("BF16", np.zeros(8, np.float32))
    del tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = ("BF16", tensors["lm_head.weight"][1].reshape(64, 128))
    problems = "\n".join(w8a8.verify(made, write_checkpoint(tmp_path / "other", tensors)).problems)
    assert "model.extra.weight: in the source, missing from the result" in problems
    assert "model.embed_tokens.weight: in the result, but neither" in problems
    assert "lm_head.weight: [64, 128] in the source, [128, 64] in the result" in problems


def test_a_config_without_the_scheme_is_found(llama: Path, made: Path) -> None:
    edit_json(made / "config.json", lambda config: config.pop("quantization_config"))
    assert any("does not declare INT8 W8A8" in p for p in w8a8.verify(made, llama).problems)


def test_a_config_that_differs_elsewhere_is_found(llama: Path, made: Path) -> None:
    edit_json(made / "config.json", lambda config: config.update(hidden_size={"a": 1}))
    assert any("differs from the source's in hidden_size" in p for p in w8a8.verify(made, llama).problems)


def test_an_excluded_layer_that_is_int8_is_found(llama: Path, made: Path) -> None:
    def exclude(config: dict[str, dict[str, object]]) -> None:
        config["quantization_config"]["exclude"] = ["lm_head", Q_PROJ.removesuffix(".weight")]

    edit_json(made / "config.json", exclude)
    assert any("config.json excludes it" in p for p in w8a8.verify(made, llama).problems)


def test_a_wrong_total_size_is_found(llama: Path, made: Path) -> None:
    edit_json(made / "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=1))
    assert any("total_size is 1" in p for p in w8a8.verify(made, llama).problems)


@pytest.mark.parametrize("metadata", [[], "none", None])
def test_an_index_with_garbled_metadata_is_a_problem_and_no_crash(llama: Path, made: Path, metadata: object) -> None:
    edit_json(made / "model.safetensors.index.json", lambda index: index.update(metadata=metadata))
    assert any("total_size is None" in p for p in w8a8.verify(made, llama).problems)


def test_a_nan_in_the_source_of_a_quantized_layer_is_found(llama: Path, made: Path) -> None:
    patch(llama, spec(llama, Q_PROJ), lambda data: b"\xc0\x7f" + data[2:])
    forget_checksums(made)
    assert any(Q_PROJ in p and "nan scales away" in p for p in w8a8.verify(made, llama).problems)


def test_int8_that_is_no_matrix_is_not_passed_unseen(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.weight"
    config = {**LLAMA, "quantization_config": quark.quantization_config(Selection([], ["lm_head"], []))}
    source = write_checkpoint(tmp_path / "in", {name: ("BF16", np.ones((2, 3, 4), np.float32))})
    made: dict[str, tuple[str, Array]] = {
        name: ("I8", np.ones((2, 3, 4), np.int8)),
        f"{name}_scale": ("F32", np.ones(2, np.float32)),
    }
    result = w8a8.verify(write_checkpoint(tmp_path / "out", made, config=config), source)
    assert any("is no matrix" in p for p in result.problems)


def test_a_missing_sidecar_is_found(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    w8a8.quantize(llama, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert any("tokenizer.json" in p for p in w8a8.verify(tmp_path / "out", llama).problems)


NOT_PROVENANCE = ["[]", "{", "", "{}", '{"shards": 3, "source": []}', '{"shards": {"model": 1}}']


@pytest.mark.parametrize("text", NOT_PROVENANCE)
def test_a_provenance_that_quantize_did_not_write_is_named(llama: Path, made: Path, text: str) -> None:
    (made / "w8a8.json").write_text(text)
    with pytest.raises(W8A8Error, match=r"w8a8\.json.*quantize"):
        w8a8.verify(made, llama)


def test_a_provenance_without_a_checksum_fails(llama: Path, made: Path) -> None:
    edit_json(made / "w8a8.json", lambda values: values["shards"].clear())
    problems = w8a8.verify(made, llama).problems
    assert all("is not the file that was written (SHA-256 differs" in problem for problem in problems)
    assert problems


def test_a_source_file_that_is_not_there_any_more_is_named(llama: Path, made: Path) -> None:
    edit_json(made / "w8a8.json", lambda values: values["source"]["sha256"].update({"../config.json": "0" * 64}))
    assert any("'../config.json': is not the file this was made from" in p for p in w8a8.verify(made, llama).problems)


def test_without_the_sources_checksums_its_tensors_are_compared_all_the_same(llama: Path, tmp_path: Path) -> None:
    w8a8.quantize(llama, tmp_path / "out")
    result = w8a8.verify(tmp_path / "out", llama)
    assert result.ok, result.problems
    assert result.checksums == 2
    other = write_checkpoint(tmp_path / "other", llama_tensors(seed=1), shards=2)
    assert w8a8.verify(tmp_path / "out", other).problems


def test_a_result_that_cannot_be_read_any_more_is_an_error_that_names_it(llama: Path, made: Path) -> None:
    (made / "w8a8.json").unlink()
    job = verification.prepare(made, llama)
    (made / job.out.shards[0].name).unlink()
    with pytest.raises(UnreadableError, match=job.out.shards[0].name):
        verification.run(job)


def test_an_unquantized_checkpoint_is_not_taken_for_a_result(llama: Path) -> None:
    result = w8a8.verify(llama, llama)
    assert not result.ok
    assert "not quantized" in result.problems[0]


def test_components_sum_up_their_tensors(llama: Path, made: Path) -> None:
    result = w8a8.verify(made, llama)
    assert {c.component: c.tensors for c in result.components} == {"attention": 8, "mlp": 6}
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_rounding_free_tensor_has_infinite_sqnr_and_prints_as_null(tmp_path: Path) -> None:
    exact = {"model.layers.0.mlp.up_proj.weight": ("F32", np.array([[127.0, 1.0]], np.float32)),
             "model.layers.0.mlp.gate_proj.weight": ("F32", np.array([[127.0, -3.0]], np.float32))}  # fmt: skip
    w8a8.quantize(write_checkpoint(tmp_path / "in", exact, config=LLAMA), tmp_path / "out")
    result = w8a8.verify(tmp_path / "out", tmp_path / "in")
    assert result.ok
    assert result.to_dict()["tensors"][0]["sqnr_db"] is None


# --- calibrated ---------------------------------------------------------------------------------------------------

NORM, GROUP = "model.layers.0.input_layernorm.weight", ("q_proj", "k_proj", "v_proj")


@pytest.fixture
def folded(llama: Path, tmp_path: Path) -> Path:
    """A result with scales folded into a norm and what reads it, as a recipe leaves it, and its record of that.

    The norm switches its first channel off.
    """
    patch(llama, spec(llama, NORM), lambda data: b"\0\0" + data[2:])
    source, rng = Checkpoint.open(llama), np.random.default_rng(0)
    values = {name: decode(read_tensor(source, tensor), tensor.dtype) for name, tensor in source.tensors.items()}
    divided: Array = values[NORM] / rng.uniform(0.2, 5, 64)
    after = round_to(divided.astype(np.float32), "BF16")
    ratio: Array = np.divide(values[NORM], after, out=np.ones_like(after), where=after != 0)
    finished: dict[str, tuple[str, Array]] = {NORM: ("BF16", after)}
    readers = [f"model.layers.0.self_attn.{leaf}.weight" for leaf in GROUP]
    for name in readers:
        weight = values[name].reshape(64, 64) * ratio
        scale = np.abs(weight).max(1) / np.float32(127)
        finished[name] = ("I8", np.rint(weight / scale[:, None]).astype(np.int8))
        finished[f"{name}_scale"] = ("F32", scale)
    write_shard(tmp_path / "finished.safetensors", finished)
    tensors = read_header(tmp_path / "finished.safetensors").tensors
    record = {
        "text": {"name": "t", "sha256": "0" * 64},
        "samples": 2,
        "tokens": 2,
        "keep_bf16": 0.0,
        "kept": [],
        "changed": readers,
        "folded": [NORM],
        "norms": [{"name": NORM, "offset": 0.0, "into": readers}],
    }
    job = prepare(llama)
    plan = make_plan(job.view, job.format, source="llama", calibration=msgspec.convert(record, CalibrationRecord))
    places = {tensor.name: Finished(tmp_path / "finished.safetensors", tensor) for tensor in tensors}
    execute(plan, job.view, tmp_path / "folded", job.format.arithmetic, finished=places)
    return tmp_path / "folded"


def test_what_was_folded_passes_and_the_rest_is_held_to_rounding(llama: Path, folded: Path) -> None:
    result = w8a8.verify(folded, llama)
    assert result.ok, result.problems
    assert (result.copied, result.folded) == (2 + 2 * 2 - 1, 1)
    assert "1 folded" in result.verdict
    other = spec(folded, "model.layers.0.self_attn.o_proj.weight")
    patch(folded, other, lambda data: bytes([data[0] ^ 4]) + data[1:])
    assert any("o_proj" in problem and "scales away" in problem for problem in w8a8.verify(folded, llama).problems)


def test_a_norm_that_does_not_undo_the_folding_is_named(llama: Path, folded: Path) -> None:
    patch(folded, spec(folded, NORM), lambda data: data[2:] + data[:2])
    problems = [p for p in w8a8.verify(folded, llama).problems if "folded into it" in p]
    assert len(problems) == len(GROUP)
    assert all(NORM in problem for problem in problems)


def test_a_folded_norm_that_is_no_number_is_named(llama: Path, folded: Path) -> None:
    patch(folded, spec(folded, NORM), lambda data: b"\xff\xff" + data[2:])
    assert any("NaN" in problem for problem in w8a8.verify(folded, llama).problems)


def test_another_matrix_in_the_place_of_a_calibrated_one_is_named(llama: Path, folded: Path) -> None:
    other = read_tensor(Checkpoint.open(folded), spec(folded, Q_PROJ.replace("q_proj", "k_proj")))
    patch(folded, spec(folded, Q_PROJ), lambda _: other)
    assert any(Q_PROJ in p and "best factors" in p for p in w8a8.verify(folded, llama).problems)


def test_what_the_record_does_not_name_must_be_as_it_was(llama: Path, folded: Path) -> None:
    edit_json(folded / "w8a8.json", lambda values: values["calibration"].update(changed=[], folded=[]))
    problems = w8a8.verify(folded, llama).problems
    assert any(NORM in problem and "bit for bit" in problem for problem in problems)
    assert any(Q_PROJ in problem and "scales away" in problem for problem in problems)
