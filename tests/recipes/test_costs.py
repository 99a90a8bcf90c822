"""Costs: the direction of the logits is Fisher's, and costs foretell the divergence that rounding makes."""

import pytest
import torch
from torch import Tensor

from tests.recipes import small
from w8a8.recipes.costs import Cost, backwards, direction
from w8a8.recipes.groups import groups_of
from w8a8.runtime.streamed import states_of

pytestmark = pytest.mark.slow

HIDDEN, VOCABULARY, TOKENS = 12, 50, 7
DRAWS = 40
FORETOLD = 0.002
"""Nats of a whole text: little enough for what is of second order."""


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 7, VOCABULARY])
def test_a_direction_is_what_the_whole_vocabulary_gives_at_once(cap: float | None, rows: int) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(TOKENS, HIDDEN) * 3, torch.randn(VOCABULARY, HIDDEN)
    found = direction(states, weight.split(rows), cap, torch.Generator().manual_seed(1))

    generator = torch.Generator().manual_seed(1)
    z = torch.cat([torch.randn(TOKENS, len(piece), generator=generator) for piece in weight.split(rows)], 1)
    states.requires_grad_()
    logits = states @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    p = logits.detach().softmax(-1)
    u = p.sqrt() * z - p * (p.sqrt() * z).sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad(logits, states, u)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_directions_have_the_covariance_of_the_fisher_information() -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(1, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    found = direction(states.expand(40_000, -1), weight.split(9), None, torch.Generator().manual_seed(1))
    p = (states @ weight.T).softmax(-1)[0]
    expected = weight.T @ (p.diag() - torch.outer(p, p)) @ weight
    assert (found.T @ found / len(found) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind", small.KNOWN)
def test_costs_foretell_the_divergence_that_small_errors_make(kind: str) -> None:
    """Noise in the outputs of one linear layer: KL divergence, and what its costs say, averaged over many draws."""
    made = small.model(kind)
    decoder, layer = made.get_decoder(), made.base_model.layers[0]
    paths = [path for group in groups_of(small.config_of(made), layer) for path in group.consumers]
    ids = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(0))
    cap = getattr(made.config, "final_logit_softcapping", None)
    states: list[Tensor] = []
    kwargs = [small.kwargs_of(made, number, ids) for number in range(3)]
    for _ in decoder.layers:
        states.append(kwargs[len(states)].pop("hidden_states"))
    with torch.no_grad():
        logits = made(ids, use_cache=False).logits[0].double()

    many = [each.expand(DRAWS, -1, -1) for each in states]
    leaving = states_of(decoder.layers[2](many[2], **kwargs[2])).detach().requires_grad_()
    read = decoder.norm(leaving)
    drawn = [
        direction(each, [made.lm_head.weight], cap, torch.Generator().manual_seed(seed))
        for seed, each in enumerate(read.detach())
    ]
    (gradient,) = torch.autograd.grad(read, leaving, torch.stack(drawn))
    for number in (2, 1):
        gradient, _, _ = backwards(decoder.layers[number], [], many[number], kwargs[number], gradient)
    gradients = backwards(layer, paths, many[0], kwargs[0], gradient)[1]

    for path in paths:
        cost = Cost.of(gradients[path].split(ids.numel()))
        size = float((FORETOLD / ids.numel() / cost.row.sum()).sqrt())
        hook = layer.get_submodule(path).register_forward_hook(
            lambda _m, _i, out, size=size: out + size * torch.stack([noise(seed, out[0]) for seed in range(DRAWS)])
        )
        with hook, torch.no_grad():
            moved = made(ids.expand(DRAWS, -1), use_cache=False).logits.double()
        p, q = logits.log_softmax(-1), moved.log_softmax(-1)
        divergences = (p.exp() * (p - q)).sum((1, 2)).tolist()
        assert sum(divergences) / len(divergences) == pytest.approx(FORETOLD, rel=0.3), path


def noise(seed: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1000 + seed))
