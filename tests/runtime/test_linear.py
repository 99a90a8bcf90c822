"""`W8A8Linear` as a module: the same numbers fused and composed, whatever a model hands it, and its parameters."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from tests.interpreter import Interpreted
from w8a8.runtime.linear import MAX_IN_FEATURES, W8A8Linear, composed, openmp_fork, padded_int_mm

pytestmark = pytest.mark.slow

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layer(inputs: int = 96, outputs: int = 70, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> W8A8Linear:
    torch.manual_seed(0)
    made = W8A8Linear(inputs, outputs, bias, dtype)
    made.weight.random_(-128, 128)
    made.weight_scale.uniform_(1e-4, 1e-2)
    if made.bias is not None:
        made.bias.normal_()
    return made


def by_torch(made: W8A8Linear, x: Tensor) -> Tensor:
    """The composition, without oneDNN: its INT8 product is not exact on every CPU."""
    with torch.backends.mkldnn.flags(enabled=False):
        return composed(x, made.weight, made.weight_scale, made.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96,), (0, 96), (1, 96), (3, 96), (2, 9, 96), (2, 0, 96), (2, 3, 4, 96)])
def test_fused_and_composed_are_equal_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    made = layer(bias=bias, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    y = made(x)
    assert y.shape == (*shape[:-1], 70)
    assert y.dtype == dtype
    assert torch.equal(y, by_torch(made, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_tokens_are_equal_too(dtype: torch.dtype) -> None:
    made = layer(dtype=dtype)
    x = torch.randn(12, 96).to(dtype)
    x[0] = 0
    x[1] *= torch.finfo(dtype).tiny
    x[2] = torch.finfo(dtype).max
    x[3] = torch.randint(-254, 255, (96,)) / 2
    x[3, 0] = 127
    x[4, 7] = torch.nan
    x[5, 9] = -torch.inf
    y = made(x)
    assert torch.equal(y.nan_to_num(123), by_torch(made, x).nan_to_num(123))
    assert y.isnan().all(dim=1).tolist() == [t in (4, 5) for t in range(12)]
    assert torch.equal(y[0], made.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpus_kernels_give_the_same_bits(interpreted: Interpreted, dtype: torch.dtype, bias: bool) -> None:
    made = layer(bias=bias, dtype=dtype)
    x = torch.randn(3, 5, 96).to(dtype)
    x[0, 1] = 0
    x[1, 2, 3] = torch.inf
    y = interpreted("w8a8.runtime.linear", "by_triton", x, made.weight, made.weight_scale, made.bias)
    assert y.shape == (3, 5, 70)
    assert torch.equal(y.nan_to_num(123), made(x).nan_to_num(123))


def test_the_result_is_near_that_of_the_linear_layer_it_stands_for() -> None:
    made = layer(512, 64, dtype=torch.float32)
    x = torch.randn(8, 512)
    exact = nn.functional.linear(x, made.weight * made.weight_scale[:, None], made.bias)
    assert (made(x) - exact).norm() / exact.norm() < 0.02


def test_inputs_need_not_be_contiguous() -> None:
    made = layer()
    x = torch.randn(96, 5, 2).bfloat16().transpose(0, 2)
    assert torch.equal(made(x), made(x.contiguous()))
    assert torch.equal(made(x[:, ::2]), made(x)[:, ::2])


def test_wrong_inputs_are_refused() -> None:
    made = layer()
    for x in (torch.zeros(2, 48), torch.zeros(192), torch.zeros(()), torch.zeros(2, 96, dtype=torch.float64)):
        with pytest.raises(ValueError, match="expected"):
            made(x)
    for inputs, outputs in ((0, 1), (1, 0), (MAX_IN_FEATURES + 1, 1)):
        with pytest.raises(ValueError, match="no INT8 layer"):
            W8A8Linear(inputs, outputs, device="meta")


@pytest.mark.parametrize(("tokens", "multiple"), [(32, 8), (1, 1)])
def test_padding_does_not_change_the_product(tokens: int, multiple: int) -> None:
    codes = torch.randint(-127, 128, (3, 45), dtype=torch.int8)
    weight = torch.randint(-127, 128, (21, 45), dtype=torch.int8)
    with torch.backends.mkldnn.flags(enabled=False):
        product = padded_int_mm(codes, weight, tokens, multiple)
    assert torch.equal(product, codes.int() @ weight.T.int())


def test_its_only_state_is_what_the_checkpoint_holds() -> None:
    made = layer()
    made(torch.randn(64, 96).bfloat16())
    state = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.state_dict().items()}
    assert state == {
        "weight": (torch.int8, (70, 96)),
        "weight_scale": (torch.float32, (70,)),
        "bias": (torch.bfloat16, (70,)),
    }
    assert not any(p.requires_grad for p in made.parameters())
    assert [name for name, value in vars(made).items() if isinstance(value, Tensor)] == []


def test_new_weights_are_used_from_the_next_call_on() -> None:
    made, other = layer(), W8A8Linear(96, 70)
    x = torch.randn(3, 96).bfloat16()
    assert torch.equal(other(x), torch.zeros(3, 70, dtype=torch.bfloat16))
    other.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(other(x), made(x))


def test_a_change_of_dtype_leaves_the_scales_float32() -> None:
    made = layer()
    moved = copy.deepcopy(made).half()
    assert moved.bias.dtype == torch.float16
    assert torch.equal(moved.weight_scale, made.weight_scale)
    assert moved.weight.dtype == torch.int8


def test_torch_lends_its_threads() -> None:
    assert openmp_fork() != 0


def test_many_threads_may_call_at_once() -> None:
    made = layer(1024, 768)  # large enough to be divided among threads
    inputs = [torch.randn(tokens, 1024).bfloat16() for tokens in (1, 2, 17, 100) * 6]
    alone = [by_torch(made, x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for y, expected in zip(pool.map(made, inputs), alone, strict=True):
            assert torch.equal(y, expected)
