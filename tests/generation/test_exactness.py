"""A prompt's greedy tokens are its own, however it is padded, batched, cached or cut into pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_eqx import build_model
from llama_eqx.generation.decode import _generate, found, generate_tokens
from llama_eqx.generation.layout import for_decoding
from llama_eqx.generation.request import Rows, prepared
from llama_eqx.generation.sampling import Sampling

LONGEST, NEW = 40, 10
NEAR = 1e-4  # logits closer than this may change places


@pytest.fixture(scope="module", params=[100, pytest.param(1000, marks=pytest.mark.slow)])
def prompts(request):
    rng = np.random.default_rng(request.param)
    return [rng.integers(0, 64, rng.integers(1, LONGEST + 1)).tolist() for _ in range(request.param)]


@pytest.fixture(scope="module")
def model(tiny):
    return build_model(tiny("model.context=128"), key=jax.random.key(0))


@pytest.fixture(scope="module")
def alone(model, prompts):
    return [generate_tokens(model, [prompt], NEW, top_logprobs=2) for prompt in prompts]


@pytest.fixture(scope="module", params=["stacked", "laid out"])
def either(request, model):
    """The model as it trains, and as it decodes: there a prompt that goes through at once is computed without a mask."""
    return model if request.param == "stacked" else for_decoding(model)


def assert_the_same(rows, alone):
    """Rows may only part where the two most probable tokens were as good as equal."""
    assert len({tuple(row) for row in rows}) > len(rows) * 0.7
    for row, own in zip(rows, alone, strict=True):
        if row != own.tokens[0]:
            t = next(t for t in range(NEW) if row[t] != own.tokens[0][t])
            (_, first), (_, second) = own.top[0][t]
            assert first - second < NEAR


def test_padded_on_the_left(either, prompts, alone):
    assert_the_same(generate_tokens(either, prompts, NEW).tokens, alone)


def test_padded_on_the_right(either, prompts, alone):
    rows, rule = prepared(either, prompts, NEW, Sampling())
    tokens, real = np.zeros(rows.tokens.shape, np.int32), np.zeros(rows.tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], real[row, : len(prompt)] = prompt, True
    turned = Rows(tokens=jnp.asarray(tokens), real=jnp.asarray(real), limits=rows.limits, keys=None, present=None)
    assert_the_same(found(jax.device_get(_generate(either, turned, rule))).tokens, alone)


def test_prefilled_in_chunks(either, prompts, alone):
    assert_the_same(generate_tokens(either, prompts, NEW, prefill_chunk=8).tokens, alone)


def test_without_a_cache(model, prompts, alone):
    rows = np.zeros((len(prompts), LONGEST + NEW), np.int32)  # what follows a text does not reach back into it
    for row, prompt, own in zip(rows, prompts, alone, strict=True):
        row[: len(prompt) + NEW] = prompt + own.tokens[0]
    best = np.asarray(jax.jit(lambda model, rows: jnp.argmax(model(rows), axis=-1))(model, rows))
    assert_the_same([row[len(prompt) - 1 :][:NEW].tolist() for row, prompt in zip(best, prompts, strict=True)], alone)


def test_in_a_cache_that_grows(model, prompts, alone, monkeypatch):
    """From 64 slots to 128, in the midst of the new tokens."""
    monkeypatch.setattr("llama_eqx.generation.decode.FEWEST", 16)
    longer = generate_tokens(model, prompts[:20], 40).tokens
    assert_the_same([row[:NEW] for row in longer], alone[:20])
    monkeypatch.setattr("llama_eqx.generation.decode.FEWEST", 128)
    jax.clear_caches()
    at_once = generate_tokens(model, prompts[:20], 40, top_logprobs=2)
    for a, b, top in zip(longer, at_once.tokens, at_once.top, strict=True):
        t = next((t for t in range(40) if a[t] != b[t]), None)
        assert t is None or top[t][0][1] - top[t][1][1] < NEAR


def test_the_comparison_can_fail(alone):
    rows = [list(own.tokens[0]) for own in alone]
    gaps = [top[0][0][1] - top[0][1][1] for (top,) in (own.top for own in alone)]
    clear = int(np.argmax(gaps))
    rows[clear][0] = alone[clear].top[0][0][1][0]
    with pytest.raises(AssertionError):
        assert_the_same(rows, alone)
