"""A contest: turns, and a first round that does not count."""

from typing import Any

from w8a8.bench.contest import race


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def ms(self, work: Any) -> float:
            work()
            return float(len(self.calls))

    clock = Counting()
    times = race({name: lambda name=name: clock.calls.append(name) for name in "ab"}, clock, 3)  # type: ignore[misc]
    assert "".join(clock.calls) == "abababab"
    assert times == {"a": (3.0, 5.0, 7.0), "b": (4.0, 6.0, 8.0)}
