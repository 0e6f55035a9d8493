"""Where the time of a run goes."""

import contextlib
import time
from collections.abc import Iterator


class Meter:
    """Speed since the last reading. Time in `pause` does not count: evaluation and the like are not training."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.begun, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what each step waits for: the next batch."""
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun
        self.steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.begun += time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """`perf/tokens_per_second`, and `data/starved_fraction`: the share of the time in which steps waited for data."""
        now = time.perf_counter()
        passed = now - self.begun
        metrics = {
            "perf/tokens_per_second": self.steps * self.tokens_per_step / passed,
            "data/starved_fraction": self.waited / passed,
        }
        self.begun, self.waited, self.steps = now, 0.0, 0
        return metrics
