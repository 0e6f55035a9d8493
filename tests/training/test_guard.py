"""Which updates are withheld."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from test_loop import config

from llama_eqx import load_config, load_pretrained
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.errors import ConfigError, NonFiniteError
from llama_eqx.sharding import MeshConfig
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.training.guard import all_finite, require_finite
from llama_eqx.training.loop import train
from llama_eqx.training.loss import LossConfig
from llama_eqx.training.optimizer import AdamWConfig
from llama_eqx.training.replay import replay
from llama_eqx.training.setup import set_up
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


def norms(steps=200):
    """Norms of gradients, a thousand times what they were at some steps, and of no use at others."""
    rng = np.random.default_rng(1)
    found = np.exp(0.2 * rng.normal(size=steps) - 0.01 * np.arange(steps))
    found[[30, 60, 61, 120]] *= 1000
    found[[50, 51]] = np.inf, 0.0
    return found.astype(np.float32)


def curve(begin=0, end=200):
    return list(zip(losses(), norms(), strict=True))[begin:end]


def judged(steps, history):
    spikes, judge = [], jax.jit(GUARD.judged)
    for loss, norm in steps:
        spike, history = judge(loss, norm, history)
        spikes.append(bool(spike))
    return spikes, history


@np.errstate(divide="ignore")
def expected(steps):
    past, found = [], []
    for value in ((loss, np.log(norm)) for loss, norm in steps):
        found.append(False)
        if not np.isfinite(value).all():
            continue
        if len(past) >= WINDOW:
            window = np.array(past[-WINDOW:])
            limit = np.median(window, 0) + THRESHOLD * stats.median_abs_deviation(window, 0, scale="normal")
            found[-1] = bool((value > limit).any())
        past.append(value)
    return found


def test_spikes_are_those_of_scipy():
    spikes, _ = judged(curve(), GUARD.history())
    assert spikes == expected(curve())
    assert sum(spikes[:150]) >= 12
    assert all(spikes[step] for step in (30, 60, 61, 120))  # of the gradient alone
    assert not any(spikes[:WINDOW])
    assert sum(spikes[150:160]) > 5
    assert sum(spikes[-30:]) <= 5  # what stays is no spike


def test_the_history_survives_a_restart(tmp_path):
    spikes, history = judged(curve(0, 77), GUARD.history())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path, load_config().checkpoint) as checkpoints:
        checkpoints.save(77, {"weight": jnp.ones(3)}, {"history": history})
    empty = {"weight": jnp.zeros(3)}, {"history": GUARD.history()}
    with Checkpoints(tmp_path, load_config().checkpoint) as checkpoints:
        found = checkpoints.restore(*(abstract(tree, jax.tree.map(lambda _: place, tree)) for tree in empty))
    assert spikes + judged(curve(77), found.training["history"])[0] == expected(curve())


@pytest.fixture
def spoilt_directions(monkeypatch):
    """The gradient is finite, and one entry of each direction is not."""
    build = AdamWConfig.build

    def spoilt(self):
        optimizer = build(self)

        def update(gradient, state, model):
            direction, state = optimizer.update(gradient, state, model)
            return jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), direction), state

        return optax.GradientTransformation(optimizer.init, update)

    monkeypatch.setattr(AdamWConfig, "build", spoilt)


def test_what_is_not_finite_of_an_update_stays_out_of_the_state(tmp_path, spoilt_directions):
    """The other entries are applied, and the step counts as withheld."""
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        train(config(tmp_path / "run", "train.eval_every=1", "checkpoint.every=1"))
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in record]
    assert [record["optim/withheld"] for record in records] == [1, 1, 1]
    assert all(np.isfinite(record["optim/grad_norm"]) and np.isnan(record["optim/update_norm"]) for record in records)
    assert records[2]["train/loss"] < records[0]["train/loss"]  # by the entries that were applied
    said = replay(load_config(f"bundle={tmp_path / 'run' / 'replay' / 'step-3.json'}", name="replay"))
    assert "is again not finite" in said
    assert "loss and gradient are finite, but the update is not" in said


def test_it_stays_out_without_being_counted_where_no_norm_of_the_update_is_measured(tmp_path, spoilt_directions):
    train(config(tmp_path / "run", "train.meters=[]", "train.log_every=1"))
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in record]
    assert all(np.isfinite(record["train/loss"]) and record["optim/withheld"] == 0 for record in records)
    assert records[-1]["train/loss"] < records[0]["train/loss"]


def test_a_gradient_a_thousand_times_as_large_is_withheld(tmp_path, monkeypatch):
    """Its loss is like the others. The weights of the step are those before it, and the run goes on.

    On one device: of eight virtual ones, which share the threads of few cores, some wait for ever in one of this step's many reductions.
    """
    build_mesh = MeshConfig.build
    monkeypatch.setattr(MeshConfig, "build", lambda self: build_mesh(self, jax.devices()[:1]))
    settings = config(tmp_path / "run", "guard.spike=6", "guard.window=4", "checkpoint.every=1", "checkpoint.keep=8")
    mark = set_up(settings).parts[5].batch.tokens
    build = LossConfig.build

    def spoilt(self, view, layout):
        loss = build(self, view, layout)

        def wrapped(model, batch, key):
            value, sums = loss(model, batch, key)
            return value + 999 * (batch.tokens == mark).all() * (value - jax.lax.stop_gradient(value)), sums

        return wrapped

    monkeypatch.setattr(LossConfig, "build", spoilt)
    train(settings)
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in record]
    assert [record["optim/spike"] for record in records] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert records[5]["optim/grad_norm"] > 500 * records[4]["optim/grad_norm"]
    assert records[5]["train/loss"] < records[0]["train/loss"]
    before, withheld, after = (jax.tree.leaves(load_pretrained(tmp_path / "run" / "checkpoints" / step)) for step in "567")
    assert all(np.array_equal(a, b) for a, b in zip(before, withheld, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(withheld, after, strict=True))


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
