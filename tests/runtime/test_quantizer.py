"""`import w8a8.runtime` and transformers loads W8A8 checkpoints, whoever wrote them, in INT8; others as before."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import w8a8
from tests.checkpoint.files import edit_json
from w8a8.errors import MissingTensorError, UnsupportedSchemeError
from w8a8.formats import COMPATS, FORMATS
from w8a8.quantization import Options
from w8a8.runtime import W8A8Config, W8A8Linear, register
from w8a8.runtime.fitting import settle
from w8a8.runtime.loading import load_model

pytestmark = pytest.mark.slow

INPUT = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with biases, as transformers writes it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, attention_bias=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "source"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    w8a8.quantize(source, tmp_path / "out")
    return tmp_path / "out"


WRITERS: Mapping[str, dict[str, Any]] = {
    **{format_: {"format": format_} for format_ in FORMATS},
    **{compat: {"compat": compat} for compat in COMPATS},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writers_checkpoint_loads_and_computes_in_int8(writer: str, source: Path, tmp_path: Path) -> None:
    w8a8.quantize(source, tmp_path / "out", Options(**WRITERS[writer]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [layer for layer in model.modules() if isinstance(layer, W8A8Linear)]
    assert len(layers) == 2 * 7
    assert all(layer.weight.dtype == torch.int8 and layer.weight_scale.dtype == torch.float32 for layer in layers)
    assert type(model.lm_head) is torch.nn.Linear
    expected = AutoModelForCausalLM.from_pretrained(source)(INPUT).logits.float()
    logits = model(INPUT).logits.float()
    assert 0 < (logits - expected).norm() / expected.norm() < 0.05
    stored = tensors_of(tmp_path / "out")
    scale = model.model.layers[1].mlp.down_proj.weight_scale
    assert torch.equal(scale, stored["model.layers.1.mlp.down_proj.weight_scale"].float().reshape(-1))


def test_formats_give_the_same_logits(source: Path, tmp_path: Path) -> None:
    logits = []
    for format_ in FORMATS:
        w8a8.quantize(source, tmp_path / format_, Options(format=format_))
        logits.append(AutoModelForCausalLM.from_pretrained(tmp_path / format_)(INPUT).logits)
    assert torch.equal(*logits)


def test_the_real_gemma_stays_int8_in_memory(gemma3_w8a8: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(gemma3_w8a8, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    held = sum(t.numel() * t.element_size() for t in model.parameters())
    assert held == sum(t.numel() * t.element_size() for t in tensors_of(gemma3_w8a8).values())
    assert sum(isinstance(layer, W8A8Linear) for layer in model.modules()) == 126
    assert isinstance(model.config.quantization_config, W8A8Config)
    json.dumps(model.config.to_dict())


def test_gemma4_loads_with_its_vision_tower_in_bf16(gemma4_w8a8: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(gemma4_w8a8, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    quantized = [name for name, layer in model.named_modules() if isinstance(layer, W8A8Linear)]
    assert len(quantized) == 7 + 7 + 6
    assert all(".language_model.layers." in name for name in quantized)


def test_an_unquantized_checkpoint_loads_as_before(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    assert not any(isinstance(layer, W8A8Linear) for layer in model.modules())


def test_an_entry_that_declares_nothing_is_no_scheme(source: Path, tmp_path: Path) -> None:
    """transformers itself refuses `{}`: a scheme without a name."""
    folder = Path(shutil.copytree(source, tmp_path / "emptied"))
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={}))
    assert type(load_model("emptied", folder).model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_registering_twice_changes_nothing(out: Path) -> None:
    register()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model.model.layers[0].mlp.up_proj, W8A8Linear)


def test_the_model_can_not_be_saved_as_if_it_were_bf16(out: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "copy")


OTHER_SCHEMES: Mapping[str, dict[str, Any]] = {
    "amd-quark": {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_group"}, "input_tensors": None},
        "export": {"pack_method": "reorder"},
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}},
    },
}


@pytest.mark.parametrize("package", OTHER_SCHEMES)
def test_another_scheme_is_named_with_what_can_load_it(
    package: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w8a8.runtime.quantizer.find_spec", lambda _: None)  # installed for other tests or not
    edit_json(out / "config.json", lambda config: config.update(quantization_config=OTHER_SCHEMES[package]))
    with pytest.raises(UnsupportedSchemeError, match=rf"int.*INT8 W8A8 only.*pip install {package}"):
        AutoModelForCausalLM.from_pretrained(out)


def test_int8_weights_without_scales_are_an_error(out: Path) -> None:
    edit_tensors(out, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale"))
    with pytest.raises(MissingTensorError, match=r"layers\.0\.mlp\.up_proj\.weight is INT8 and has no weight_scale"):
        AutoModelForCausalLM.from_pretrained(out)


def test_scales_of_another_scheme_are_an_error(out: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    edit_tensors(out, lambda tensors: tensors.update({name: torch.ones(96, 2)}))
    with pytest.raises(UnsupportedSchemeError, match=r"scales \[96, 2\]"):
        AutoModelForCausalLM.from_pretrained(out)


def test_int8_where_the_model_has_no_linear_layer_is_an_error(out: Path) -> None:
    name = "model.embed_tokens.weight"
    edit_tensors(out, lambda tensors: tensors.update({name: torch.ones(128, 64, dtype=torch.int8)}))
    with pytest.raises(UnsupportedSchemeError, match=r"embed_tokens.weight is INT8, .* a Embedding"):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_layer_tied_to_an_int8_one_is_that_layer() -> None:
    """As the layers that Zamba runs several times."""
    model = torch.nn.ModuleDict({"one": W8A8Linear(8, 4, bias=False), "other": torch.nn.Linear(8, 4, bias=False)})
    model["other"].weight = model["one"].weight
    settle(model)
    assert model["other"] is model["one"]


def test_without_transformers_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['transformers'] = None; import w8a8.runtime"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtraError" in run.stderr
    assert "pip install 'w8a8[serve]'" in run.stderr


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def edit_tensors(folder: Path, change: Any) -> None:
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
