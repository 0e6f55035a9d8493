"""Speculative decoding: the tokens of the large model when greedy, and its distribution when not."""

import math

import equinox as eqx
import jax
import numpy as np
import pytest
from scipy import stats

from llama_eqx import build_model
from llama_eqx.data.tokenizer import BytesTokenizer
from llama_eqx.errors import ConfigError, NonFiniteError
from llama_eqx.generation.constraints import constrained
from llama_eqx.generation.decode import generate_tokens
from llama_eqx.generation.layout import for_decoding
from llama_eqx.generation.request import prepared
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.search import search_beams
from llama_eqx.generation.speculative import _speculate, generate_speculatively
from llama_eqx.generation.stream import stream_tokens
from llama_eqx.generation.text import continued

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [60, 2, 33], [12] * 16]
NEW = 12


@pytest.fixture(scope="module")
def draft(tiny):
    return build_model(tiny("model.dims.vocab=61", "model.dims.layers=1"), key=jax.random.key(9))


@pytest.mark.parametrize("drafted", [1, 3])
def test_greedy_is_that_of_the_model(model, draft, drafted):
    plain = generate_tokens(model, PROMPTS, NEW)
    ours = generate_speculatively(model, draft, PROMPTS, NEW, drafted=drafted)
    assert ours.generation.tokens == plain.tokens
    for a, b in zip(ours.generation.logprobs, plain.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    stop = [plain.tokens[0][3], plain.tokens[1][0]]
    assert generate_speculatively(model, draft, PROMPTS, NEW, drafted=drafted, stop=stop).generation.tokens == (
        generate_tokens(model, PROMPTS, NEW, stop=stop).tokens
    )
    known = generate_speculatively(model, draft, PROMPTS, NEW, drafted=drafted, vocab=11)
    assert known.generation.tokens == generate_tokens(model, PROMPTS, NEW, vocab=11).tokens
    assert max(map(max, known.generation.tokens)) < 11


def test_where_jax_has_64_bits(model, draft):
    with jax.enable_x64(True):
        rows, rule = prepared(model, PROMPTS, NEW, Sampling(temperature=1.0))
        state = eqx.filter_eval_shape(_speculate, model, draft, rows, rule, 3)
    assert (state.new.dtype, state.logprobs.dtype) == ("int32", "float32")


def test_a_draft_by_the_model_itself_is_kept(model):
    """Laid out for decoding or not, and in a cache that grows."""
    long = generate_tokens(model, PROMPTS[:1], 57)
    ours = generate_speculatively(model, for_decoding(model), PROMPTS[:1], 57, drafted=3)
    assert ours.generation.tokens == long.tokens
    assert ours.tokens_per_round == 4
    assert generate_speculatively(model, model, PROMPTS[:1], 3, drafted=3).tokens_per_round == 2  # of four, what was asked for
    stop = [long.tokens[0][4]]
    for prompts in (PROMPTS[:1], PROMPTS[:2]):
        rows = generate_tokens(model, prompts, NEW, stop=stop).tokens
        ours = generate_speculatively(model, model, prompts, NEW, drafted=5, stop=stop)
        longest = max(map(len, rows)) - 1  # up to where it stops
        assert (ours.generation.tokens, ours.tokens_per_round) == (rows, longest / math.ceil(longest / 6))
    assert len({*map(len, rows)}) == 2


@pytest.mark.parametrize("way", ["plain", "draft"])
def test_the_distribution_is_that_of_the_model(way, model):
    """The joint distribution of four tokens, each one of three, against the model's own probabilities: 2,000 draws.

    The three are the same for all tokens. Otherwise draws with one key would hardly depend on each other.

    The draft is the model with noise on its weights: it proposes what the model might say, and is refused a good part of the time. One
    that is right or wrong throughout would not show whether it is refused as often as it should be.
    """
    leaves, structure = jax.tree.flatten(model)
    noise = jax.random.split(jax.random.key(7), len(leaves))
    draft = structure.unflatten([x + 0.4 * x.std() * jax.random.normal(key, x.shape) for key, x in zip(noise, leaves, strict=True)])
    sampling, prompt, count = Sampling(temperature=4.0), [5, 6, 7], 2000
    rows, rule = prepared(model, [prompt], 4, sampling, vocab=3)
    if way == "plain":
        drawn = generate_tokens(model, [prompt], 4, sampling, samples=count, vocab=3).tokens
    else:
        keys = jax.random.split(jax.random.key(4), (count, 1))
        one = lambda keys: _speculate(model, draft, eqx.tree_at(lambda r: r.keys, rows, keys), rule, 3).new  # noqa: E731
        drawn = np.asarray(eqx.filter_jit(eqx.filter_vmap(one))(keys))[:, 0, :4].tolist()

    @eqx.filter_jit
    def chances(tokens, last):
        return jax.nn.softmax(constrained(rule.known(model(tokens)[:, last]), sampling.constraints, None))

    expected = {(): 1.0}
    for n in range(4):
        tokens = np.zeros((27, 6), np.int32)  # one shape for all prefixes: what comes later changes nothing
        tokens[: len(expected), : 3 + n] = [prompt + list(prefix) for prefix in expected]
        rows_of = zip(expected.items(), np.asarray(chances(tokens, 2 + n)), strict=False)
        expected = {(*prefix, int(i)): p * float(x[i]) for (prefix, p), x in rows_of for i in np.flatnonzero(x)}
    total = sum(expected.values())  # 1 but for float32, which is too far off for scipy
    expected = {each: p / total for each, p in expected.items()}
    counts = {each: 0 for each in expected}
    for row in drawn:
        counts[tuple(row)] += 1  # a KeyError is a token that the model would not draw
    p_value = lambda counts: stats.chisquare(list(counts), [count * p for p in expected.values()]).pvalue  # noqa: E731
    assert min(expected.values()) * count > 5
    assert p_value(counts.values()) > 0.01
    flat = np.random.default_rng(0).multinomial(
        count, np.asarray([p**0.8 for p in expected.values()]) / sum(p**0.8 for p in expected.values())
    )
    assert p_value(flat) < 1e-3  # so the test can fail


@pytest.mark.parametrize(
    ("settings", "where"),
    [({"drafted": 0}, "drafted"), ({"samples": 2}, "samples"), ({"top_logprobs": 1}, "top_logprobs")],
)
def test_bad_settings(model, draft, settings, where):
    with pytest.raises(ConfigError) as error:
        generate_speculatively(model, draft, PROMPTS, NEW, **settings)
    assert error.value.where == where


def test_models_and_penalties_that_do_not_fit(model, draft, tiny):
    with pytest.raises(ConfigError, match="the draft model has 64 ids, the model 61"):
        generate_speculatively(model, build_model(tiny(), key=jax.random.key(0)), PROMPTS, NEW)
    with pytest.raises(ConfigError, match="penalties"):
        generate_speculatively(model, draft, PROMPTS, NEW, Sampling(repetition_penalty=1.1))


@pytest.mark.parametrize("way", ["plain", "stream", "beams", "draft"])
def test_a_model_without_finite_logits_writes_nothing(way, model, draft):
    """It wrote token 0, again and again, with log-probabilities that are no numbers."""
    broken = eqx.tree_at(lambda m: m.final_norm.weight, model, model.final_norm.weight * np.nan)
    ways = {
        "plain": lambda: generate_tokens(broken, PROMPTS, NEW),
        "stream": lambda: next(stream_tokens(broken, PROMPTS, NEW)),
        "beams": lambda: search_beams(broken, PROMPTS, NEW, 2),
        "draft": lambda: generate_speculatively(broken, draft, PROMPTS, NEW),
    }
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        ways[way]()


def test_the_sample_of_a_run_without_finite_logits_says_so(tiny):
    """An error would end a run whose guard lets it go on."""
    model = build_model(tiny("model.dims.vocab=258"), key=jax.random.key(0))
    broken = eqx.tree_at(lambda m: m.final_norm.weight, model, model.final_norm.weight * np.nan)
    assert continued(broken, BytesTokenizer(), [5], NEW, Sampling()) == "(the model's logits are not finite, so it chose no tokens)"
