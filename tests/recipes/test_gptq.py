"""Rounding with compensation."""

import torch

from w8a8.recipes.gptq import compensation, nearest, round_with


def problem(seed: int, tokens: int = 400, rows: int = 40, columns: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / 8 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs


def test_the_output_error_is_lower_than_rounded_to_nearest() -> None:
    for seed in range(3):
        weight, inputs = problem(seed)
        plain = nearest(weight)
        codes = round_with(weight, plain.scale, compensation(inputs.T @ inputs))
        errors = [(inputs @ (c.float() * plain.scale[:, None] - weight).T).square().sum() for c in (plain.codes, codes)]
        assert errors[1] < 0.7 * errors[0]


def test_codes_stay_in_range_and_the_weight_as_it_was() -> None:
    weight, inputs = problem(0)
    before = weight.clone()
    codes = round_with(weight, nearest(weight).scale * 0.5, compensation(inputs.T @ inputs))
    assert codes.dtype == torch.int8
    assert (codes.min(), codes.max()) == (-127, 127)
    assert torch.equal(weight, before)


def test_channels_that_are_never_active_are_rounded_to_nearest() -> None:
    weight, inputs = problem(0)
    inputs[:, 7] = 0
    inputs[:, 200:] = 0
    plain = nearest(weight)
    codes = round_with(weight, plain.scale, compensation(inputs.T @ inputs))
    assert torch.equal(codes[:, 200:], plain.codes[:, 200:])
    assert torch.equal(codes[:, 7], plain.codes[:, 7])


def test_no_activity_at_all_is_rounding_to_nearest() -> None:
    weight, _ = problem(0, columns=64)
    plain = nearest(weight)
    assert torch.equal(round_with(weight, plain.scale, compensation(torch.zeros(64, 64))), plain.codes)


def test_a_hessian_that_has_no_inverse_costs_compensation_and_not_the_run() -> None:
    weight, _ = problem(0, columns=64)
    plain = nearest(weight)
    assert torch.equal(round_with(weight, plain.scale, compensation(torch.full((64, 64), torch.nan))), plain.codes)
    rank_one = torch.ones(64, 64) * 1e8
    assert round_with(weight, plain.scale, compensation(rank_one)).shape == weight.shape
