"""Every constraint against transformers' processor of the same name; OpenAI's two penalties against their definition by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_eqx.generation.constraints import History, constrained, keep_min_p, keep_top_k, keep_top_p
from llama_eqx.generation.sampling import Sampling

LOGITS = np.random.default_rng(0).normal(size=(16, 97), scale=3).astype(np.float32)
ROWS = np.random.default_rng(1).integers(0, 97, (16, 60))  # some ids several times
PROMPT = 20  # of each row


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def history():
    present = np.zeros(LOGITS.shape, bool)
    np.put_along_axis(present, ROWS[:, :PROMPT], True, axis=1)
    history = History(present=jnp.asarray(present), generated=jnp.zeros(LOGITS.shape, jnp.int32))
    for t in range(PROMPT, ROWS.shape[1]):
        history = history.extended(jnp.asarray(ROWS[:, t], jnp.int32))
    return history


def ours(history, **settings):
    return np.asarray(constrained(jnp.asarray(LOGITS), Sampling(**settings).constraints, history))


def theirs(*processors):
    x = torch.tensor(LOGITS)
    for processor in processors:
        x = processor(torch.tensor(ROWS), x)
    return x.numpy()


def assert_alike(a, b):
    assert np.array_equal(np.isfinite(a), np.isfinite(b))
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 97, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 0.999, 1.0])
def test_temperature_top_k_and_top_p(temperature, top_k, top_p):
    reference = [TemperatureLogitsWarper(temperature)]
    reference += [] if top_k is None else [TopKLogitsWarper(top_k)]
    reference += [] if top_p is None else [TopPLogitsWarper(top_p)]
    assert_alike(ours(None, temperature=temperature, top_k=top_k, top_p=top_p), theirs(*reference))


@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("top_p", [None, 0.7])
def test_min_p(min_p, top_p):
    reference = [TemperatureLogitsWarper(1.7), *([] if top_p is None else [TopPLogitsWarper(top_p)]), MinPLogitsWarper(min_p)]
    assert_alike(ours(None, temperature=1.7, top_p=top_p, min_p=min_p), theirs(*reference))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_repetition_penalty(history, penalty, temperature):
    reference = [RepetitionPenaltyLogitsProcessor(penalty), *([TemperatureLogitsWarper(temperature)] if temperature else [])]
    assert_alike(ours(history, repetition_penalty=penalty, temperature=temperature), theirs(*reference))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_presence_and_frequency_penalties(history, temperature):
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, where c counts what was sampled, before the temperature."""
    found = ours(history, presence_penalty=0.7, frequency_penalty=-0.4, temperature=temperature) * (temperature or 1)
    for row in range(16):
        for j in range(97):
            c = ROWS[row, PROMPT:].tolist().count(j)
            np.testing.assert_allclose(found[row, j], LOGITS[row, j] + c * 0.4 - (c > 0) * 0.7, rtol=1e-5, atol=1e-6)


def test_order_matters():
    """The nucleus is that of the scaled and truncated distribution: any other order keeps other tokens."""
    x = jnp.asarray(LOGITS)
    right = np.isfinite(theirs(TemperatureLogitsWarper(2.5), TopKLogitsWarper(7), TopPLogitsWarper(0.9)))
    assert np.array_equal(np.isfinite(keep_top_p(keep_top_k(x / 2.5, k=7), p=0.9)), right)
    assert not np.array_equal(np.isfinite(keep_top_k(keep_top_p(x / 2.5, p=0.9), k=7)), right)
    assert not np.array_equal(np.isfinite(keep_top_p(keep_top_k(x, k=7), p=0.9)), right)


def test_nucleus_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    for p, kept in {1e-9: [1], 0.4: [1], 0.6: [1, 3], 0.74: [1, 3], 0.8: [1, 2, 3], 0.95: [0, 1, 2, 3]}.items():
        assert np.flatnonzero(np.isfinite(keep_top_p(logits, p=p))).tolist() == kept
    powers = jnp.log(jnp.array([[0.125, 0.5, 0.125, 0.25]]))  # whose sums are exact
    assert np.flatnonzero(np.isfinite(keep_top_p(powers, p=0.75))).tolist() == [1, 3]


def test_equals_are_kept_together():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]])
    assert np.isfinite(keep_top_k(logits, k=1)).tolist() == [[False, True, True, False]]
    assert np.isfinite(keep_top_p(logits, p=0.01)).tolist() == [[False, True, True, False]]
    assert np.isfinite(keep_min_p(logits, p=1.0)).tolist() == [[False, True, True, False]]
