"""Times that can be compared: candidates take turns, and medians are reported.

The speed of a shared machine drifts by tens of percent within a minute, so two candidates
that are timed one after the other cannot be compared. Here every round runs each of them
once, in turn.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

# One sample takes at least so long, or the clock and the call itself would be part of it.
MIN_SECONDS = 0.01


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    min_seconds: float = MIN_SECONDS,
    warm: bool = False,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Median seconds of one call of each candidate.

    Args:
      calls: Functions without arguments that return JAX arrays.
      rounds: Samples behind each median.
      min_seconds: A sample repeats a quick call until about so much time has gone by.
      warm: Whether everything is compiled. Otherwise each call runs once before anything is
        timed, so that compilation does not count.
      on_round: Progress: called with the number of each round before it begins.
    """
    repeats = {name: _repeats(call, min_seconds, warm) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        if on_round is not None:
            on_round(number)
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                jax.block_until_ready(call())
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(times) for name, times in samples.items()}


def _repeats(call: Callable[[], Any], min_seconds: float, warm: bool) -> int:
    if not warm:
        jax.block_until_ready(call())
    if min_seconds <= 0:
        return 1
    start = time.perf_counter()
    jax.block_until_ready(call())
    return max(1, round(min_seconds / max(time.perf_counter() - start, 1e-9)))


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds since the block began; once it has ended, the seconds that it took."""
    start = time.perf_counter()
    end: list[float] = []
    try:
        yield lambda: (end[0] if end else time.perf_counter()) - start
    finally:
        end.append(time.perf_counter())


class Phases:
    """Seconds that each phase of some work took; one name may be counted many times."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the first phase could begin."""
        return time.perf_counter() - self._start

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` towards `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def count(self, name: str) -> Iterator[None]:
        """Counts the block towards `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    @contextlib.contextmanager
    def follow(self) -> Iterator[Callable[[str], None]]:
        """For work that reports its phases: call what is given as each one begins."""
        current: list[tuple[str, float]] = []

        def begin(name: str | None) -> None:
            now = time.perf_counter()
            if current:
                before, since = current.pop()
                self.add(before, now - since)
            if name is not None:
                current.append((name, now))

        try:
            yield begin
        finally:
            begin(None)
