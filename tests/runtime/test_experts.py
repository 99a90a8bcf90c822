"""Experts in INT8 equal an exact reference, in every family; what cannot run is refused when it is loaded."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.runtime.conftest import Mixtures
from tests.runtime.moe import EXPERTS, FAMILIES, quantize, tensors_of
from w8a8.errors import MissingTensorError, UnsupportedModelError, UnsupportedSchemeError
from w8a8.kernels.cpu import int8
from w8a8.runtime.experts import Experts, W8A8Experts, apart, in_int8
from w8a8.runtime.linear import W8A8Linear
from w8a8.runtime.loading import load_model

pytestmark = pytest.mark.slow

INPUT = torch.arange(3, 40)[None] * 5 % 128


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(family: str, mixtures: Mixtures) -> Path:
    return mixtures(family)[0]


@pytest.fixture
def out(family: str, mixtures: Mixtures) -> Path:
    return mixtures(family)[1]


def exact(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """An INT8 layer with exact sums, rounded as `w8a8.runtime.linear` says."""
    amax = x.float().abs().amax(1, keepdim=True)
    codes = (x.float() * (torch.full_like(amax, 127) / amax)).round()
    y = (codes.double() @ weight.double().T).float() * scale.reshape(-1) * (amax / torch.full_like(amax, 127))
    return (y if bias is None else y + bias.float()).to(x.dtype)


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


BETWEEN: dict[str, Callable[..., Tensor]] = {
    "gemma4": lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
    "gpt_oss": gpt_oss,
    "nemotron_h": lambda up: functional.relu(up).square(),
}
"""What a family computes between the projections, if not SiLU(gate) * up."""


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


class Recorded:
    """The inputs and the output of one layer's experts in a run of the model."""

    def __init__(self, place: str, experts: nn.Module) -> None:
        self.place, self.experts = place, experts
        self.inputs: tuple[Tensor, ...] = ()
        self.output = torch.empty(0)
        experts.register_forward_hook(self._note)

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs, self.output = inputs, output


def run(folder: Path, dtype: str = "auto") -> tuple[Tensor, list[Recorded]]:
    model = load_model("moe", folder, dtype)
    recorded = [Recorded(place, experts) for place, experts in model.named_modules() if isinstance(experts, Experts)]
    with torch.no_grad():
        logits: Tensor = model(input_ids=INPUT, use_cache=False).logits
    return logits, recorded


def stored_experts(folder: Path) -> Iterator[Callable[[int, str], tuple[Tensor, Tensor, Tensor | None]]]:
    """For each layer's experts in the file: what gives one's weight, scale and bias."""
    tensors = tensors_of(folder)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    places = sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name})

    def layer(place: str) -> Callable[[int, str], tuple[Tensor, Tensor, Tensor | None]]:
        def find(number: int, part: str) -> tuple[Tensor, Tensor, Tensor | None]:
            name = f"{place}.experts.{number}.{part}"
            if f"{name}.weight" not in tensors:
                name = f"{place}.experts.{number}.{names[part]}"
            return tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], tensors.get(f"{name}.bias")

        return find

    return map(layer, places)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_experts_equal_an_exact_reference(family: str, out: Path, dtype: str) -> None:
    _, recorded = run(out, dtype)
    assert recorded
    for layer, find in zip(recorded, stored_experts(out), strict=True):

        def expert(number: int, x: Tensor, find: Any = find) -> Tensor:
            parts = ["up_proj"] if family == "nemotron_h" else ["gate_proj", "up_proj"]
            made = [exact(x, *find(number, part)) for part in parts]
            between: Callable[..., Tensor] = BETWEEN.get(family, silu)
            inner = between(*made)
            return exact(inner, *find(number, "down_proj"))

        if family == "llama4":
            (states,) = layer.inputs
            chosen = states.view(EXPERTS, -1, states.shape[-1])
            expected = torch.stack([expert(n, chosen[n]).nan_to_num(0) for n in range(EXPERTS)]).view(states.shape)
            assert torch.equal(layer.output, expected)
            continue
        states, numbers, weights = layer.inputs
        total = torch.zeros(states.shape)
        for n in range(EXPERTS):
            share = ((numbers == n) * weights.float()).sum(1, keepdim=True)
            total += torch.where(share == 0, 0, expert(n, states).float() * share)
        assert torch.equal(layer.output, total.to(states.dtype))


def test_the_model_computes_what_its_source_does(source: Path, out: Path) -> None:
    logits, _ = run(out, "float32")
    expected, _ = run(source, "float32")
    assert 0 < ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.1  # a few choose other experts


@pytest.fixture
def mixtral(mixtures: Mixtures) -> Path:
    return mixtures("mixtral")[1]


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3"
BROKEN: dict[str, tuple[type[Exception], str, Callable[[dict[str, Tensor]], Any]]] = {
    "an expert missing": (
        MissingTensorError,
        r"layers\.1\.mlp\.experts holds INT8 experts, and up_proj\.2\.weight is missing",
        lambda tensors: (tensors.pop(f"{EXPERT}.weight"), tensors.pop(f"{EXPERT}.weight_scale")),
    ),
    "a scale missing": (
        MissingTensorError,
        r"up_proj\.2\.weight_scale is missing",
        lambda tensors: tensors.pop(f"{EXPERT}.weight_scale"),
    ),
    "an expert too many": (
        UnsupportedSchemeError,
        r"experts\.4\.w3\.weight \(I8\) is no part of the INT8 experts beside it",
        lambda tensors: tensors.update({EXPERT.replace(".2.", ".4.") + ".weight": tensors[f"{EXPERT}.weight"].clone()}),
    ),
    "a wrong shape": (
        UnsupportedSchemeError,
        r"experts\.2\.w3\.weight has shape \[64, 96\].* 96 x 64",
        lambda tensors: tensors.update({f"{EXPERT}.weight": tensors[f"{EXPERT}.weight"].T.contiguous()}),
    ),
    "scales of another scheme": (
        UnsupportedSchemeError,
        r"scales \[96, 2\]",
        lambda tensors: tensors.update({f"{EXPERT}.weight_scale": torch.ones(96, 2)}),
    ),
    "an expert in BF16": (
        UnsupportedSchemeError,
        r"experts\.2\.w3\.weight \(BF16\) is no part of the INT8 experts",
        lambda tensors: (
            tensors.pop(f"{EXPERT}.weight_scale"),
            tensors.update({f"{EXPERT}.weight": torch.ones(96, 64, dtype=torch.bfloat16)}),
        ),
    ),
    "a bias": (
        UnsupportedSchemeError,
        r"experts\.2\.w3\.bias \(BF16\) is no part",
        lambda tensors: tensors.update({f"{EXPERT}.bias": torch.ones(96, dtype=torch.bfloat16)}),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_experts_are_refused_when_loaded(case: str, mixtral: Path, tmp_path: Path) -> None:
    kind, message, change = BROKEN[case]
    folder = Path(shutil.copytree(mixtral, tmp_path / "broken"))
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(kind, match=message):
        load_model("broken", folder)


def test_experts_of_an_unknown_kind_are_refused() -> None:
    class Other(nn.Module):  # type: ignore[misc]
        down_proj = nn.Parameter(torch.empty(4, 64, 96, device="meta"))

    with pytest.raises(UnsupportedSchemeError, match=r"a Other cannot run in INT8 here"):
        in_int8("model.layers.0.mlp.experts", Other(), split=False)
    with pytest.raises(UnsupportedModelError, match=r"a Other cannot be run expert by expert.*--recipe rtn"):
        apart("model.layers.0.mlp.experts", Other(), nn.Linear, split=False)


def test_a_layer_may_keep_all_its_experts(mixtral: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixtral, tmp_path / "mixed"))
    source = tensors_of(mixtral.with_name("mixtral"))
    kept = {name: value for name, value in source.items() if "layers.0.block_sparse_moe.experts" in name}
    tensors = {name: value for name, value in tensors_of(folder).items() if "layers.0.block_sparse_moe.exp" not in name}
    save_file({**tensors, **kept}, folder / "model.safetensors", metadata={"format": "pt"})
    layers = load_model("mixed", folder).model.layers
    assert isinstance(layers[1].mlp.experts, W8A8Experts)
    gate_up = layers[0].mlp.experts.gate_up_proj
    assert torch.equal(gate_up[3, 96:], kept["model.layers.0.block_sparse_moe.experts.3.w3.weight"])


def test_only_int8_is_held_and_both_spellings_give_the_same(mixtral: Path, tmp_path: Path) -> None:
    quark = quantize(mixtral.with_name("mixtral"), tmp_path / "quark", "quark")
    assert torch.equal(run(mixtral)[0], run(quark)[0])
    model = load_model("moe", quark)
    held = sum(value.nbytes for value in model.parameters())
    assert held == sum(value.nbytes for value in tensors_of(quark).values())
    assert len([layer for layer in model.modules() if isinstance(layer, W8A8Linear)]) == 2 * (4 + 3 * EXPERTS)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"], indirect=True)
@pytest.mark.parametrize("tokens", [1, 37])
def test_only_chosen_experts_are_read_each_once_for_all_its_tokens(
    out: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel is given, in a run of the model: no weight of an expert that no token has chosen."""
    model = load_model("moe", out)
    recorded = [Recorded(place, experts) for place, experts in model.named_modules() if isinstance(experts, Experts)]
    multiply, read = int8.linear, []

    def watched(x: int, weight: int, *more: Any, **settings: Any) -> None:
        read.append((weight, more[3][0]))
        multiply(x, weight, *more, **settings)

    monkeypatch.setattr(int8, "linear", watched)
    with torch.no_grad():
        model(input_ids=INPUT[:, :tokens], use_cache=False)
    assert recorded
    for layer in recorded:
        chosen, owners = chosen_tokens(layer), {}
        for name, part in layer.experts.named_modules():
            if isinstance(part, W8A8Linear):
                owners[part.weight.data_ptr()] = int(name.split(".")[1])
        projections = len(owners) // EXPERTS
        found = [(owners[weight], count) for weight, count in read if weight in owners]
        assert sorted(found) == sorted(((n, count) for n, count in chosen.items() for _ in range(projections)))
        assert len({weight for weight, _ in read if weight in owners}) == len(found)
        assert len(chosen) < EXPERTS or tokens > 1


def chosen_tokens(layer: Recorded) -> dict[int, int]:
    """How many tokens have chosen each expert, of those that any has."""
    if len(layer.inputs) == 1:  # Llama 4's are given zeros by tokens that have not chosen them
        counts = layer.inputs[0].view(EXPERTS, -1, layer.inputs[0].shape[-1]).any(-1).sum(1)
    else:
        counts = layer.inputs[1].reshape(-1).bincount(minlength=EXPERTS)
    return {n: count for n, count in enumerate(counts.tolist()) if count}


def test_only_chosen_experts_run(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = load_model("moe", mixtral).model.layers[0].mlp.experts
    ran: list[tuple[int, int]] = []

    def expert(number: int, x: Tensor) -> Tensor:
        ran.append((number, len(x)))
        return x

    monkeypatch.setattr(experts, "expert", expert)
    chosen = torch.tensor([[2, 0], [2, 0], [2, EXPERTS]])
    y = experts(torch.ones(3, 64), chosen, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert ran == [(0, 2), (2, 3)]
    assert y[:, 0].tolist() == [3, 7, 5]
