"""Layers that stay in BF16: which of them are computed in float32, by which rule, and what comes out."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.serve.embedded.servers import word_tokenizer
from w8a8.evals.kld.models import Predictor
from w8a8.kernels.cpu import bf16, instructions
from w8a8.runtime.linear import W8A8Linear
from w8a8.runtime.unquantized import FEW, BF16Linear, widen
from w8a8.serve.embedded.model import OneModel

pytestmark = pytest.mark.slow

WHOLE = (-9, 10)
"""Whole numbers whose sums of products float32 holds exactly."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that the kernel has multiplied, on a CPU without BF16 arithmetic."""
    found: list[int] = []
    kernel = bf16.linear

    def linear(*args: Any, **kwargs: Any) -> None:
        found.append(args[4][0])
        kernel(*args, **kwargs)

    monkeypatch.setattr(bf16, "linear", linear)
    monkeypatch.setattr(instructions, "multiplies_bf16", lambda: False)
    return found


def layer(inputs: int = 96, outputs: int = 70, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(inputs, outputs, bias, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    for parameter in made.parameters():
        parameter.random_(*WHOLE)
    return made


def in_float32(made: nn.Linear, x: Tensor) -> Tensor:
    bias = None if made.bias is None else made.bias.float()
    return nn.functional.linear(x.float(), made.weight.float(), bias).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (0, 96), (1, 96), (3, 96), (2, 9, 96), (2, 0, 96), (2, 3, 4, 96)])
def test_it_computes_in_float32_and_rounds_once(shape: tuple[int, ...], bias: bool, calls: list[int]) -> None:
    made = widen(layer(bias=bias))
    x = torch.empty(shape, dtype=torch.bfloat16).random_(*WHOLE)
    with torch.inference_mode():
        y = made(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, in_float32(made, x))
    assert calls == [x.numel() // 96]


def test_inputs_need_not_be_contiguous(calls: list[int]) -> None:
    made, x = widen(layer()), torch.empty(96, 5, 2, dtype=torch.bfloat16).random_(*WHOLE).transpose(0, 2)
    with torch.inference_mode():
        assert torch.equal(made(x), in_float32(made, x))
        assert torch.equal(made(x[:, ::2]), in_float32(made, x[:, ::2]))
    assert len(calls) == 2


def test_only_plain_layers_in_bf16_are_replaced_and_keep_their_parameters() -> None:
    class Special(nn.Linear):  # type: ignore[misc]
        pass

    model = nn.ModuleDict(
        {
            "plain": layer(),
            "float32": nn.Linear(4, 4),
            "special": Special(4, 4, dtype=torch.bfloat16),
            "int8": W8A8Linear(4, 4),
            "embedding": nn.Embedding(70, 96, dtype=torch.bfloat16),
        }
    )
    model["embedding"].weight = model["plain"].weight
    before = dict(model.named_parameters())
    assert widen(model) is model
    assert {name for name, module in model.items() if type(module) is BF16Linear} == {"plain"}
    assert model["embedding"].weight is model["plain"].weight
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)


def test_torch_computes_where_a_gradient_may_be_wanted_or_the_dtype_has_changed(calls: list[int]) -> None:
    made = widen(layer())
    x = torch.randn(3, 96).bfloat16().requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        assert made.float()(torch.randn(3, 96)).dtype == torch.float32
        with pytest.raises(RuntimeError, match="dtype"):
            made(torch.randn(3, 96).bfloat16())
    assert calls == []


def test_a_cpu_with_bf16_arithmetic_multiplies_many_tokens_by_itself(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = widen(layer())
    for has_bf16 in (True, False):
        monkeypatch.setattr(instructions, "multiplies_bf16", lambda has_bf16=has_bf16: has_bf16)
        with torch.inference_mode():
            for tokens in (1, FEW, FEW + 1):
                made(torch.randn(tokens, 96).bfloat16())
    assert calls == [1, FEW, 1, FEW, FEW + 1]


def test_results_depend_on_neither_threads_nor_batch_nor_other_callers(calls: list[int]) -> None:
    made = widen(nn.Linear(1024, 2048, dtype=torch.bfloat16))  # large enough to be divided among threads
    x = torch.randn(300, 1024).bfloat16()
    threads = torch.get_num_threads()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def run(x: Tensor) -> Tensor:
        return made(x)

    try:
        torch.set_num_threads(1)
        expected = run(x)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(x), expected)
            assert torch.equal(run(x[:1]), expected[:1])
        with ThreadPoolExecutor(4) as pool:
            parts = x.split([1, 2, 30, 267])
            assert torch.equal(torch.cat([*pool.map(run, parts)]), expected)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 9


def test_the_embedded_engine_computes_so_unless_float32_is_asked_for_and_kld_never(tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    Gemma3ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    served = OneModel("it", tmp_path, None).model
    linears = {name: module for name, module in served.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 8
    assert {type(module) for module in linears.values()} == {BF16Linear}
    assert served.lm_head.weight is served.get_input_embeddings().weight
    wide = OneModel("it", tmp_path, None, "float32").model
    assert wide.dtype == torch.float32
    assert type(wide.lm_head) is nn.Linear
    assert type(Predictor("it", tmp_path).model.lm_head) is nn.Linear
    with torch.inference_mode():
        near, exact = (model(torch.arange(20)[None]).logits for model in (served, wide))
    assert (near - exact).norm() / exact.norm() < 0.02
