"""A model run one layer at a time is the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import w8a8.runtime  # so that the whole models load too
from tests.calibrate.checkpoints import KINDS, make, make_elastic_gemma
from tests.runtime.conftest import Mixtures
from tests.support.tiny import make_model
from w8a8.checkpoint import Checkpoint
from w8a8.errors import EngineError, UnsupportedModelError
from w8a8.formats import FORMATS
from w8a8.quantization import Options
from w8a8.runtime.streamed import StreamedModel, forward
from w8a8.sources.opening import as_run

pytestmark = pytest.mark.slow

IDS = list(range(3, 60))


def weighty(module: nn.Module) -> bool:
    return any(not value.is_meta for value in module.parameters())


@torch.no_grad()  # type: ignore[untyped-decorator]
def streamed_logits(model: StreamedModel) -> Tensor:
    """The logits of `IDS`, layer by layer; no two layers ever have weights."""
    states, kwargs = model.embed(IDS)
    for number in range(model.count):
        with model.layer(number) as layer:
            assert weighty(layer)
            assert sum(weighty(model.hollow(n)) for n in range(model.count)) == 1
            states = forward(layer, states, kwargs[number])
        assert not any(weighty(model.hollow(n)) for n in range(model.count))
    model.fill_head()
    model.last_states(states)
    logits: Tensor = model.model(input_ids=torch.tensor([IDS]), use_cache=False).logits
    return logits


@torch.no_grad()  # type: ignore[untyped-decorator]
def whole_logits(folder: Path, dtype: Any) -> Tensor:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=dtype).eval()
    logits: Tensor = model(input_ids=torch.tensor([IDS]), use_cache=False).logits
    return logits


def check(folder: Path, dtype: torch.dtype | None = torch.float32) -> None:
    logits = streamed_logits(StreamedModel("model", as_run(Checkpoint.open(folder)), dtype))
    assert torch.equal(logits, whole_logits(folder, dtype or "auto"))


@pytest.mark.parametrize("kind", KINDS)
def test_layer_by_layer_a_model_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    check(make(tmp_path / kind, kind))
    check(tmp_path / kind, dtype=None)


@pytest.mark.parametrize(
    "model_type", ["chameleon", "falcon", "falcon_h1", "gpt2", "gpt_neox_japanese", "llama4", "openai-gpt"]
)
def test_models_do_whose_layers_have_other_names_or_give_tuples(model_type: str, tmp_path: Path) -> None:
    make_model(model_type, torch.float32).save_pretrained(tmp_path)
    check(tmp_path)


@pytest.mark.parametrize("model_type", ["falcon", "llama4_text", "longcat_flash"])
def test_quantized_ones_of_these_do(model_type: str, tmp_path: Path) -> None:
    make_model(model_type).save_pretrained(tmp_path / "source")
    w8a8.quantize(tmp_path / "source", tmp_path / "result")
    check(tmp_path / "result")


def test_an_embedding_that_is_stored_in_parts_is_refused(tmp_path: Path) -> None:
    make_model("molmo2").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens\.weight is no embedding of the checkpoint"):
        check(tmp_path)


def test_the_real_gemma_3_does(gemma3: Path) -> None:
    check(gemma3)


@pytest.mark.parametrize("format_", FORMATS)
def test_quantized_models_do_in_both_formats(format_: str, tmp_path: Path) -> None:
    w8a8.quantize(make(tmp_path / "llama"), tmp_path / "out", Options(format=format_))
    check(tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "jamba", "qwen3_vl_moe"])
def test_mixtures_of_experts_do_in_bf16_and_in_int8(family: str, mixtures: Mixtures) -> None:
    source, out = mixtures(family)
    check(source)
    check(out, dtype=None)


def test_a_gemma_4_does_without_its_vision_tower(gemma4: Path, gemma4_w8a8: Path) -> None:
    check(gemma4)
    check(gemma4_w8a8, dtype=None)
    model = StreamedModel("gemma4", as_run(Checkpoint.open(gemma4)))
    assert all(value.is_meta for name, value in model.model.named_parameters() if "vision" in name)


def test_the_embedding_is_read_by_rows(tmp_path: Path) -> None:
    model = StreamedModel("model", as_run(Checkpoint.open(make(tmp_path / "model"))))
    states, _ = model.embed([5, 3, 5])
    assert torch.equal(states[0, 0], states[0, 2])
    assert not torch.equal(states[0, 0], states[0, 1])
    weight = model.model.get_input_embeddings().weight
    assert weight.untyped_storage().nbytes() == weight.element_size()


def test_layers_do_that_share_keys_and_values_and_read_inputs_of_their_own(tmp_path: Path) -> None:
    make_elastic_gemma(tmp_path)
    check(tmp_path)
    model = StreamedModel("gemma4", as_run(Checkpoint.open(tmp_path)), torch.float32)
    assert model.own(model.embed(IDS)[1], model.embed(IDS)[1]) == [{}] * 6
    others = [*reversed(IDS)]
    assert [[*own] for own in model.own(model.embed(others)[1], model.embed(IDS)[1])] == [["per_layer_input"]] * 6
    table = model.model.get_decoder().embed_tokens_per_layer.weight
    assert table.untyped_storage().nbytes() == table.element_size()  # read by rows, as the embedding is


def test_the_head_reads_what_the_model_gives_it_and_its_outputs_are_scaled(tmp_path: Path) -> None:
    make_model("granite", torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "logits_scaling": 4.0}))
    model = StreamedModel("model", as_run(Checkpoint.open(tmp_path)), torch.float32)
    assert model.logit_scale(IDS) == pytest.approx(1 / 4)
    states = torch.randn(1, len(IDS), config["hidden_size"], requires_grad=True)
    read = model.read_by_head(IDS, states)
    norm = model.model.get_decoder().norm
    assert torch.equal(read, norm(states))
    assert read.requires_grad
    assert torch.equal(model.embed(IDS)[0], model.embed(IDS)[0])  # all layers are hollow again


def test_a_layer_without_its_weights_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    model = StreamedModel("model", as_run(Checkpoint.open(folder)))
    with pytest.raises(UnsupportedModelError, match=r"layers\.3\..* is not in the checkpoint"), model.layer(3):
        pass


def test_an_invented_architecture_is_refused(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps({"architectures": ["Invented"], "model_type": "llama"}))
    with pytest.raises(EngineError, match="no architecture Invented"):
        StreamedModel("model", as_run(Checkpoint.open(llama)))
