"""The task of every side of a comparison and the form of its answer: one JSON argument in, one JSON line out."""

import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, SupportsFloat

import numpy as np


@dataclasses.dataclass(frozen=True)
class Task:
    """Steps of training on `batch` rows of `seq` tokens.

    `precision` is float32, mixed (float32 state, bfloat16 compute) or bfloat16 (everything in bfloat16). `options` belong to one side.
    """

    dims: dict[str, int]
    theta: float
    tied: bool
    batch: int
    seq: int
    precision: str
    device: str
    threads: int
    steps: int
    warmup: int = 3
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def given(cls) -> "Task":
        """Returns the task in `sys.argv` and sets the threads of numeric libraries. Call it before importing them."""
        task = cls(**json.loads(sys.argv[1]))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(task.threads)
        if task.device == "cpu":
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
        return task

    def rows(self) -> list[np.ndarray]:
        """Returns eight batches [batch, seq + 1] of random ids, the same for all sides."""
        rng = np.random.default_rng(0)
        return [rng.integers(0, self.dims["vocab"], (self.batch, self.seq + 1)) for _ in range(8)]

    def measure(self, step: Callable[[int], SupportsFloat], **said: Any) -> None:
        """Times `step(i)`, which makes a step on rows i % 8 and returns its loss, and prints the answer.

        A loss is read one step late, as in training loops, so that a GPU never waits for its next work. The loss of the first step is read
        at once; the time by which this step exceeds the others is compilation.
        """
        losses, seconds, last = [], [], None
        for i in range(self.warmup + self.steps):
            begun = time.perf_counter()
            loss = step(i)
            if last is None:
                float(loss)
            else:
                losses.append(float(last))
            last = loss
            seconds.append(time.perf_counter() - begun)
        losses.append(float(loss))
        first, seconds = seconds[0], seconds[self.warmup :]
        answer = {
            "tokens_per_second": self.batch * self.seq / statistics.median(seconds),
            "step_seconds": statistics.median(seconds),
            "step_seconds_range": [min(seconds), max(seconds)],
            "compile_seconds": first - statistics.median(seconds),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(answer | said), flush=True)

    def measure_decoding(self, generate: Callable[[int], np.ndarray], **said: Any) -> None:
        """Times `generate(n)`, which returns n greedy tokens for the first `prompt` ids of the first batch, and prints the answer.

        The rate counts the tokens after the first, so that it includes neither the prompt nor the overhead of a call.
        """
        new = self.options["new"]
        begun = time.perf_counter()
        for n in (1, new, 1, new):
            tokens = generate(n)
            assert tokens.shape == (self.batch, n), tokens.shape
        warmup = time.perf_counter() - begun
        seconds: dict[int, list[float]] = {1: [], new: []}
        for _ in range(self.steps):
            for n, found in seconds.items():
                begun = time.perf_counter()
                generate(n)
                found.append(time.perf_counter() - begun)
        first = statistics.median(seconds[1])
        step = (statistics.median(seconds[new]) - first) / (new - 1)
        answer = {
            "tokens_per_second": self.batch / step,
            "step_seconds": step,
            "first_seconds": first,
            "warmup_seconds": warmup,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(answer | said), flush=True)
