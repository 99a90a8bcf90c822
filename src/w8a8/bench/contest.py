"""A contest in one process: contenders take turns, a clock times them, and the first round does not count."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Work = Callable[[], Any]

_FLUSH = 512 << 20
"""Bytes written before each piece of work on a GPU: more than any GPU's caches hold."""


_AHEAD = 500_000
"""Cycles that a GPU spins before it is timed, a quarter of a millisecond: Python launches kernels in it."""


class Clock(Protocol):
    """A clock that times a piece of work."""

    def ms(self, work: Work) -> float:
        """Return the milliseconds that `work` takes."""


class DeviceClock:
    """Times launches by events on the GPU, with cold caches, while the GPU is kept from waiting for the CPU."""

    def __init__(self, device: "torch.device") -> None:
        """Allocate the memory that is written to empty the caches."""
        import torch

        self._flush = torch.empty(_FLUSH // 4, dtype=torch.int32, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def ms(self, work: Work) -> float:
        """Return the milliseconds between the events before and after the launches of `work`.

        All of them are in the GPU's queue before the first begins, so the time it takes to launch does not count.
        """
        import torch

        self._flush.zero_()
        torch.cuda._sleep(_AHEAD)
        self._start.record()
        work()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))


class HostClock:
    """Times work that is done when it returns, as on a CPU."""

    def ms(self, work: Work) -> float:
        """Return the milliseconds by the wall clock."""
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3


def race(contenders: Mapping[str, Work], clock: Clock, runs: int) -> dict[str, tuple[float, ...]]:
    """Return each contender's milliseconds in each of `runs` rounds, by turns, after one round that warms up."""
    rounds = [{name: clock.ms(work) for name, work in contenders.items()} for _ in range(runs + 1)]
    return {name: tuple(times[name] for times in rounds[1:]) for name in contenders}
