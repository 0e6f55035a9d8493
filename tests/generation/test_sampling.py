"""Draws against the distribution they are drawn from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llama_eqx.generation.constraints import constrained
from llama_eqx.generation.sampling import LEAST, Sampling, draw

DRAWS = 20_000
ROW = np.random.default_rng(1).normal(size=12, scale=1.5).astype(np.float32)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def p_value(temperature, expected, **settings):
    """Of a chi-square test that draws at `temperature` have the probabilities `expected`."""
    keys = jax.random.split(jax.random.key(2), DRAWS)
    logits = jnp.tile(ROW, (DRAWS, 1))
    tokens = draw(constrained(logits, Sampling(temperature=temperature, **settings).constraints, None), keys)
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


def test_the_lowest_temperature_is_greedy():
    """Divided by less, logits would all be infinite."""
    logits = jnp.asarray(np.stack([ROW, ROW - 100, 1e6 * ROW]))
    for settings in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3}):
        heated = constrained(logits, Sampling(temperature=LEAST, **settings).constraints, None)
        assert draw(heated, jax.random.split(jax.random.key(0), 3)).tolist() == [int(ROW.argmax())] * 3


def test_truncated_draws_follow_the_renormalised_distribution():
    largest = np.where(np.sort(ROW)[-4] <= ROW, ROW, -np.inf)
    assert p_value(1.0, probabilities(largest), top_k=4) > 0.01
    order = np.argsort(-ROW)
    nucleus = order[: np.searchsorted(np.cumsum(probabilities(ROW)[order]), 0.8) + 1]
    assert 1 < len(nucleus) < 12
    kept = np.where(np.isin(np.arange(12), nucleus), ROW, -np.inf)
    assert p_value(1.0, probabilities(kept), top_p=0.8) > 0.01
    likely = np.where(probabilities(ROW) >= 0.3 * probabilities(ROW).max(), ROW, -np.inf)
    assert p_value(1.0, probabilities(likely), min_p=0.3) > 0.01


def test_tokens_of_low_probability_are_drawn():
    """Of 65,536 tokens with a probability of 2⁻²⁷ each, one comes in every 2,048 draws; 70 is the first key that draws one.

    With the resolution that JAX draws with unless asked, none ever comes.
    """
    logits = jnp.full((1, 2**16 + 1), -27 * math.log(2), jnp.float32).at[:, 0].set(0)
    assert draw(logits, jax.random.key(70)[None])[0] > 0
