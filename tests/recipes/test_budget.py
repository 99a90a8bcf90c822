"""What stays in BF16."""

from hypothesis import given
from hypothesis import strategies as st

from w8a8.recipes.budget import Damage, choose_bf16

DAMAGES = st.dictionaries(
    st.integers(), st.builds(Damage, st.floats(0, 1e3), st.integers(1, 1000)), min_size=1, max_size=12
)


@given(DAMAGES, st.integers(0, 4000))
def test_the_budget_is_kept_and_nothing_that_fits_is_left_out(damages: dict[int, Damage], budget: int) -> None:
    chosen = choose_bf16(damages, budget)
    left = budget - sum(damages[key].nbytes for key in chosen)
    assert left >= 0
    assert len(set(chosen)) == len(chosen)
    assert all(damages[key].nbytes > left for key in damages if key not in chosen and damages[key].error > 0)
    assert all(damages[key].error > 0 for key in chosen)


@given(DAMAGES)
def test_the_first_to_stay_is_the_one_that_costs_most_per_byte(damages: dict[int, Damage]) -> None:
    worst = max(each.error / each.nbytes for each in damages.values())
    chosen = choose_bf16(damages, 10**9)
    assert not chosen or damages[chosen[0]].error / damages[chosen[0]].nbytes == worst
