"""Filters of logits against transformers' own, and draws against the distribution they are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llama_eqx.generation.sampling import keep_top_k, keep_top_p, restricted, sample

LOGITS = np.random.default_rng(0).normal(size=(16, 97), scale=3).astype(np.float32)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def theirs(temperature=1.0, top_k=None, top_p=None):
    x = TemperatureLogitsWarper(float(temperature))(None, torch.tensor(LOGITS))
    x = x if top_k is None else TopKLogitsWarper(top_k)(None, x)
    return (x if top_p is None else TopPLogitsWarper(top_p)(None, x)).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 97, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 0.999, 1.0])
def test_agrees_with_transformers(temperature, top_k, top_p):
    ours = restricted(jnp.asarray(LOGITS), temperature=temperature, top_k=top_k, top_p=top_p)
    reference = theirs(temperature, top_k, top_p)
    assert np.array_equal(np.isfinite(ours), np.isfinite(reference))
    np.testing.assert_allclose(ours, reference, rtol=1e-6)


def test_order_matters():
    """The nucleus is that of the scaled and truncated distribution: any other order keeps other tokens."""
    x = jnp.asarray(LOGITS)
    right = np.isfinite(theirs(2.5, 7, 0.9))
    assert np.array_equal(np.isfinite(keep_top_p(keep_top_k(x / 2.5, 7), 0.9)), right)
    assert not np.array_equal(np.isfinite(keep_top_k(keep_top_p(x / 2.5, 0.9), 7)), right)
    assert not np.array_equal(np.isfinite(keep_top_p(keep_top_k(x, 7), 0.9)), right)


def test_nucleus_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    for p, kept in {0.4: [1], 0.6: [1, 3], 0.74: [1, 3], 0.8: [1, 2, 3], 0.95: [0, 1, 2, 3]}.items():
        assert np.flatnonzero(np.isfinite(keep_top_p(logits, p))).tolist() == kept


def test_equals_are_kept_together():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]])
    assert np.isfinite(keep_top_k(logits, 1)).tolist() == [[False, True, True, False]]
    assert np.isfinite(keep_top_p(logits, 0.01)).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.2}])
def test_temperature_zero_is_the_argmax(settings):
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    assert np.array_equal(sample(jnp.asarray(LOGITS), keys, temperature=0.0, **settings), LOGITS.argmax(-1))


DRAWS = 20_000
ROW = np.random.default_rng(1).normal(size=12, scale=1.5).astype(np.float32)


def p_value(temperature, expected, **settings):
    """Of a chi-square test that draws at `temperature` have the probabilities `expected`."""
    keys = jax.random.split(jax.random.key(2), DRAWS)
    tokens = sample(jnp.tile(ROW, (DRAWS, 1)), keys, temperature=temperature, **settings)
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert not counts[expected == 0].any()
    return stats.chisquare(counts[expected > 0], DRAWS * expected[expected > 0]).pvalue


def probabilities(logits):
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def test_draws_follow_the_distribution():
    assert p_value(1.0, probabilities(ROW)) > 0.01
    assert p_value(0.7, probabilities(ROW / np.float32(0.7))) > 0.01
    assert p_value(1.2, probabilities(ROW)) < 1e-3  # so the test can fail


def test_truncated_draws_follow_the_renormalised_distribution():
    largest = np.where(np.sort(ROW)[-4] <= ROW, ROW, -np.inf)
    assert p_value(1.0, probabilities(largest), top_k=4) > 0.01
    order = np.argsort(-ROW)
    nucleus = order[: np.searchsorted(np.cumsum(probabilities(ROW)[order]), 0.8) + 1]
    assert 1 < len(nucleus) < 12
    kept = np.where(np.isin(np.arange(12), nucleus), ROW, -np.inf)
    assert p_value(1.0, probabilities(kept), top_p=0.8) > 0.01
