"""No step waits for the numbers of its own."""

import math

import jax
import jax.numpy as jnp
import pytest

from llama_eqx.data.pipeline import Progress
from llama_eqx.errors import NonFiniteError
from llama_eqx.flops import mfu
from llama_eqx.tracking.tracker import Tracker
from llama_eqx.training.reporter import Reporter


class Said(Tracker):
    def __init__(self, happened):
        self.happened = happened

    def log(self, step, metrics):
        self.happened.append(f"step {step} is logged, loss {metrics['train/loss']}")


def reporting(tracker, *, log_every, last_step):
    fixed = {"max_withheld": 1, "tokens": 8, "epochs": lambda step: {}, "flops_per_token": 10**12, "device_kind": "TPU v4", "devices": 1}
    return Reporter(tracker, log_every=log_every, last_step=last_step, **fixed)


def test_numbers_are_fetched_when_the_next_step_has_begun(monkeypatch):
    happened, device_get = [], jax.device_get

    def fetch(metrics):
        fetched = device_get(metrics)
        happened.append(f"loss {fetched['train/loss']} is fetched")
        return fetched

    monkeypatch.setattr(jax, "device_get", fetch)
    reporter = reporting(Said(happened), log_every=1, last_step=3)
    for step in (1, 2, 3):
        happened.append(f"step {step} has begun")
        metrics = {"train/loss": step + 0.5, "optim/grad_norm": 1.0, "optim/withheld": 0.0}
        reporter.add(step, {name: jnp.float32(value) for name, value in metrics.items()}, Progress(step=step, ledger=0, tokens=8 * step))
    with reporter.pause():
        happened.append("evaluation")

    def reported(step):
        return [f"loss {step + 0.5} is fetched", f"step {step} is logged, loss {step + 0.5}"]

    begun = [f"step {step} has begun" for step in (1, 2, 3)]
    assert happened == [begun[0], begun[1], *reported(1), begun[2], *reported(2), *reported(3), "evaluation"]


def rates_of(monkeypatch, steps, seconds, pauses=()):
    """Tokens a second by logged step, of a reporter of `steps` that are computed while they are begun, as on some CPUs, each for so many
    `seconds`; after `pauses` there is an evaluation of ten. The reporter comes too.
    """
    clock, rates = [0.0], {}
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Rates(Tracker):
        def __init__(self):
            pass

        def log(self, step, metrics):
            rates[step] = metrics["perf/tokens_per_second"]

    reporter = reporting(Rates(), log_every=5, last_step=steps[-1])
    for step in steps:
        clock[0] += seconds(step)
        metrics = {name: jax.block_until_ready(jnp.float32(0)) for name in ("train/loss", "optim/grad_norm", "optim/withheld")}
        reporter.add(step, metrics, Progress(step=step, ledger=0, tokens=8 * step))
        if step in pauses:
            with reporter.pause():
                clock[0] += 10
    reporter.flush()
    return rates, reporter


def test_the_time_of_a_step_ends_with_it(monkeypatch):
    rates, _ = rates_of(monkeypatch, range(1, 10), lambda step: 1, pauses=(6, 9))
    assert rates == {1: 8.0, 5: 8.0, 9: 8.0}


def test_compilation_counts_for_the_first_step_of_a_start_alone(monkeypatch):
    """A run goes on at its seventh step, which takes a minute and is not logged."""
    rates, reporter = rates_of(monkeypatch, range(7, 16), lambda step: 60 if step == 7 else 1)
    assert rates == {10: 8.0, 15: 8.0}
    assert reporter.typical() == {"perf/tokens_per_second": 8, "data/starved_fraction": 0, "perf/mfu": mfu(8.0, 10**12, "TPU v4", 1)}


@pytest.mark.parametrize(
    ("norm", "said"), [(2.0, "numbers of its update that are not finite are withheld, 1 of 1"), (math.inf, "its update is withheld, 1")]
)
def test_it_says_what_is_withheld(norm, said):
    """Of a finite gradient only those numbers of its update that are not finite."""
    happened = []
    told = Said(happened)
    told.say = happened.append
    metrics = {"train/loss": 5.0, "optim/grad_norm": norm, "optim/withheld": 1.0}
    reporter = reporting(told, log_every=5, last_step=9)
    reporter.add(2, {name: jnp.float32(value) for name, value in metrics.items()}, Progress(step=2, ledger=0, tokens=8))
    with pytest.raises(NonFiniteError):
        reporter.flush()
    assert said in happened[-1]
