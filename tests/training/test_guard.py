"""Which updates are withheld."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llama_eqx import load_config
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.errors import ConfigError, NonFiniteError
from llama_eqx.training.guard import all_finite, require_finite
from llama_eqx.training.state import abstract

WINDOW, THRESHOLD = 16, 4.0
GUARD = load_config(f"guard.window={WINDOW}", f"guard.spike={THRESHOLD}").guard


def losses(steps=200):
    """A curve with spikes, a loss that is not finite, and at last a rise that stays."""
    rng = np.random.default_rng(0)
    found = 3 - 0.004 * np.arange(steps) + 0.05 * rng.normal(size=steps)
    found[rng.choice(steps, 12, replace=False)] += 2
    found[[40, 41, 90]] = [np.nan, np.inf, -np.inf]
    found[150:] += 3
    return found.astype(np.float32)


def judged(values, history):
    spikes, judge = [], jax.jit(GUARD.judged)
    for value in values:
        spike, history = judge(value, history)
        spikes.append(bool(spike))
    return spikes, history


def expected(values):
    past, found = [], []
    for value in values:
        window = past[-WINDOW:]
        found.append(False)
        if len(window) == WINDOW and np.isfinite(value):
            limit = np.median(window) + THRESHOLD * stats.median_abs_deviation(window, scale="normal")
            found[-1] = bool(value > limit)
        if np.isfinite(value):
            past.append(value)
    return found


def test_spikes_are_those_of_scipy():
    spikes, _ = judged(losses(), GUARD.history())
    assert spikes == expected(losses())
    assert sum(spikes[:150]) >= 8
    assert not any(spikes[:WINDOW])
    assert sum(spikes[150:160]) > 5
    assert sum(spikes[-30:]) <= 5  # what stays is no spike


def test_the_history_survives_a_restart(tmp_path):
    spikes, history = judged(losses()[:77], GUARD.history())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path, load_config().checkpoint) as checkpoints:
        checkpoints.save(77, {"weight": jnp.ones(3)}, {"history": history})
    empty = {"weight": jnp.zeros(3)}, {"history": GUARD.history()}
    with Checkpoints(tmp_path, load_config().checkpoint) as checkpoints:
        found = checkpoints.restore(*(abstract(tree, jax.tree.map(lambda _: place, tree)) for tree in empty))
    assert spikes + judged(losses()[77:], found.training["history"])[0] == expected(losses())


def test_without_the_rule_there_is_no_history():
    assert load_config().guard.history() is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_saved(bad):
    good = {"a": jnp.ones(3), "count": jnp.int32(1), "half": jnp.ones(2, jnp.bfloat16)}
    assert all_finite(good)
    require_finite(good, 7)
    for name in ("a", "half"):
        with pytest.raises(NonFiniteError, match="step 7"):
            require_finite({**good, name: good[name].at[1].set(bad)}, 7)


@pytest.mark.parametrize("wrong", ["window=0", "spike=0", "max_withheld=0"])
def test_config_refuses(wrong):
    with pytest.raises(ConfigError):
        load_config(f"guard.{wrong}")
    assert dataclasses.is_dataclass(GUARD)
