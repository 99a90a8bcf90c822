"""RMSNorm in one call: the bits of transformers' own modules, and those modules themselves where it has other ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from w8a8.kernels.cpu import norm
from w8a8.runtime import norms
from w8a8.runtime.norms import in_one_call

pytestmark = pytest.mark.slow

CLASSES = [LlamaRMSNorm, Qwen2RMSNorm, Gemma3RMSNorm, nn.RMSNorm]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes that the kernel is given."""
    found: list[tuple[int, int]] = []

    def watched(*arguments: Any) -> None:
        found.append(arguments[3])
        norm.norm(*arguments)

    monkeypatch.setattr(norms, "norm", watched)
    return found


def pair(kind: type[nn.Module], inputs: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A module with random weights, and the same in one call."""
    torch.manual_seed(0)
    plain, ours = (nn.Sequential(kind(inputs, eps=1e-6)).to(dtype) for _ in range(2))
    plain[0].weight.data.normal_()
    ours.load_state_dict(plain.state_dict())
    return plain[0], in_one_call(ours)[0]


def bits(y: Tensor) -> Tensor:
    return y.contiguous().view(torch.int16 if y.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("inputs", [64, 100, 896, 2048, 5003])
def test_it_has_the_bits_of_the_module(
    kind: type[nn.Module], inputs: int, dtype: torch.dtype, calls: list[tuple[int, int]]
) -> None:
    plain, ours = pair(kind, inputs, dtype)
    calls.clear()
    with torch.inference_mode():
        for shape in ((inputs,), (1, inputs), (1, 4, inputs), (2, 0, inputs), (2, 3, inputs)):
            for size in (1e-3, 1, 50):
                x = (torch.randn(shape) * size).to(dtype)
                x[..., -1] = 0
                assert torch.equal(bits(ours(x)), bits(plain(x)))
    assert len(calls) == 15


@pytest.mark.parametrize("kind", CLASSES)
def test_heads_keep_their_order_in_memory(kind: type[nn.Module], calls: list[tuple[int, int]]) -> None:
    plain, ours = pair(kind, 64, torch.bfloat16)
    x = torch.randn(1, 7, 4, 64).bfloat16()
    calls.clear()
    with torch.inference_mode():
        for turned in (x.transpose(1, 2), x[:, ::2].transpose(1, 2), x.transpose(0, 1), x.flip(1)):
            y = ours(turned)
            assert y.shape == turned.shape
            assert torch.equal(bits(y), bits(plain(turned)))
        assert ours(x.transpose(1, 2)).transpose(1, 2).is_contiguous()
    assert len(calls) == 5


def test_what_torch_divides_among_threads_and_what_needs_a_gradient_stays_torchs(calls: list[tuple[int, int]]) -> None:
    plain, ours = pair(LlamaRMSNorm, 256, torch.float32)
    calls.clear()
    with torch.inference_mode():
        for tokens in (127, 128):
            x = torch.randn(1, tokens, 256)
            assert torch.equal(ours(x), plain(x))
        assert ours(torch.randn(2, 256).bfloat16()).dtype == torch.float32
    ours(torch.randn(3, 256)).sum().backward()
    assert ours.weight.grad is not None
    assert calls == [(127, 256)]


class MeanFirstRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Adds to the root instead of the mean."""

    def forward(self, x: Tensor) -> Tensor:
        root = x.float().pow(2).mean(-1, keepdim=True).sqrt()
        made: Tensor = self.weight * (x.float() / (root + self.variance_epsilon)).to(x.dtype)
        return made


class FailingRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Needs more than an input."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        made: Tensor = super().forward(x) * gate
        return made


@pytest.mark.parametrize("kind", [MeanFirstRMSNorm, FailingRMSNorm, nn.LayerNorm])
def test_a_module_that_computes_otherwise_stays_as_it_is(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(96, eps=1e-5)).bfloat16()
    assert type(in_one_call(model)[0]) is kind


def test_a_model_has_the_same_logits_and_parameters() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).bfloat16().eval()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(ids).logits
        names = dict(model.named_parameters())
        assert in_one_call(model) is model
        changed = [module for module in model.modules() if hasattr(module, "in_one_call")]
        assert len(changed) == 2 * 6 + 1
        assert all(isinstance(module, Gemma3RMSNorm) for module in changed)
        assert torch.equal(model(ids).logits, before)
    assert all(names[name] is parameter for name, parameter in model.named_parameters())
