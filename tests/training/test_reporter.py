"""No step waits for the numbers of its own."""

import numpy as np

from llama_eqx.data.pipeline import Progress
from llama_eqx.tracking.tracker import Tracker
from llama_eqx.training.reporter import Reporter


class Number:
    """A number on a device, which says when the host asks for it."""

    def __init__(self, name, happened):
        self.name, self.happened = name, happened

    def __array__(self, dtype=None, copy=None):
        self.happened.append(f"{self.name} is fetched")
        return np.asarray(0.5)


class Said(Tracker):
    def __init__(self, happened):
        self.happened = happened

    def log(self, step, metrics):
        self.happened.append(f"step {step} is logged")


def test_numbers_are_fetched_when_the_next_step_has_begun():
    happened = []
    reporter = Reporter(
        Said(happened),
        log_every=1,
        last_step=3,
        max_withheld=1,
        tokens=8,
        epochs=lambda step: {},
        flops_per_token=1,
        device_kind="cpu",
        devices=1,
    )
    for step in (1, 2, 3):
        metrics = {name: Number(f"{name} {step}", happened) for name in ("train/loss", "optim/grad_norm")}
        happened.append(f"step {step} has begun")
        reporter.add(step, metrics | {"optim/withheld": np.float32(0)}, Progress(step=step, ledger=0, tokens=8 * step))
    with reporter.pause():
        happened.append("evaluation")

    def reported(step):
        return [f"train/loss {step} is fetched", f"optim/grad_norm {step} is fetched", f"step {step} is logged"]

    begun = [f"step {step} has begun" for step in (1, 2, 3)]
    assert happened == [begun[0], begun[1], *reported(1), begun[2], *reported(2), *reported(3), "evaluation"]
