"""Generation against transformers, against the forward without a cache, and against itself in other batches."""

import equinox as eqx
import jax
import jaxtyping
import numpy as np
import pytest
import torch

from llama_eqx import trace
from llama_eqx.errors import ConfigError
from llama_eqx.generation import decode, request, stream
from llama_eqx.generation.decode import generate_tokens
from llama_eqx.generation.layout import for_decoding
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.search import search_beams
from llama_eqx.generation.speculative import generate_speculatively
from llama_eqx.generation.stream import stream_tokens
from llama_eqx.model.cache import emptied, with_length

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [60, 2, 33], [12] * 16]
NEW = 12
WARM = Sampling(temperature=1.0)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def greedy(model):
    return generate_tokens(model, PROMPTS, NEW)


def continued(reference, prompts, **settings):
    """Greedy continuations by transformers, the prompts padded on the left."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings |= {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    return reference.generate(tokens, attention_mask=mask, **settings)[:, width:].tolist()


def test_equals_transformers_in_a_padded_batch(greedy, reference):
    assert len({tuple(row) for row in greedy.tokens}) == len(PROMPTS)
    assert greedy.tokens == continued(reference, PROMPTS)


def test_alone_equals_in_a_batch(model, greedy, reference):
    for prompt, tokens in zip(PROMPTS, greedy.tokens, strict=True):
        assert generate_tokens(model, [prompt], NEW).tokens == continued(reference, [prompt]) == [tokens]


def test_padding_of_any_width_changes_nothing(model, greedy, monkeypatch):
    monkeypatch.setattr(request, "SHORTEST", 32)
    wider = generate_tokens(model, PROMPTS, NEW)
    assert wider.tokens == greedy.tokens
    for a, b in zip(wider.logprobs, greedy.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}], ids=str)
def test_equals_the_forward_without_a_cache(model, settings):
    new = generate_tokens(model, PROMPTS, NEW, Sampling(**settings))
    rows = np.zeros((len(PROMPTS), 16 + NEW), np.int32)  # what follows a text does not reach back into it
    for row, prompt, tokens in zip(rows, PROMPTS, new.tokens, strict=True):
        row[: len(prompt) + NEW] = prompt + tokens
    full = np.asarray(jax.nn.log_softmax(jax.jit(lambda model, rows: model(rows))(model, rows)))
    for row, prompt, tokens, logprobs in zip(full, PROMPTS, new.tokens, new.logprobs, strict=True):
        row = row[len(prompt) - 1 :][:NEW]
        np.testing.assert_allclose(logprobs, row[np.arange(NEW), tokens], atol=1e-5)
        if not settings:
            assert tokens == row.argmax(-1).tolist()


@pytest.mark.parametrize("array", [np.asarray, jax.numpy.asarray, lambda prompts: [*map(np.asarray, prompts)]], ids=["np", "jnp", "rows"])
def test_prompts_in_arrays(model, monkeypatch, array):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations name arrays of two axes
    prompts = [[5, 6, 7], [60, 2, 33]]
    assert generate_tokens(model, array(prompts), 3, stop=array([2])).tokens == generate_tokens(model, prompts, 3, stop=[2]).tokens


def test_one_token(model, greedy):
    assert generate_tokens(model, PROMPTS, 1).tokens == [row[:1] for row in greedy.tokens]


def test_up_to_the_end_of_the_context(model, greedy):
    longest = generate_tokens(model, PROMPTS[-1:], 64 - 16)
    assert len(longest.tokens[0]) == 48
    assert longest.tokens[0][:NEW] == greedy.tokens[-1]


def in_beams(model, prompts, new, **settings):
    return [beam for beams in search_beams(model, prompts, new, 3, **settings) for beam in beams]


WAYS = {
    "at once": lambda *args, first_row: generate_tokens(*args, first_row=first_row).tokens,
    "samples": lambda *args, first_row: generate_tokens(*args, WARM, samples=2, first_row=first_row).tokens,
    "streamed": lambda *args, first_row: list(zip(*stream_tokens(*args, every=3, first_row=first_row), strict=True)),
    "drafted": lambda model, *args, first_row: generate_speculatively(model, model, *args, drafted=3).generation.tokens,
    "beams": lambda *args, first_row: in_beams(*args, length_penalty=3.0),
    "early beams": lambda *args, first_row: in_beams(*args, stop=[8, 33], early_stopping=True),
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way == "early beams")) for way in WAYS])
def test_each_prompt_has_its_own_room_in_the_context(model, way):
    """A prompt that leaves few new tokens cuts no other short."""
    prompts = [[7, 8] * 30, [9] * 63, [3]]
    rows = WAYS[way](model, prompts, NEW, first_row=0)
    alone = [row for i, prompt in enumerate(prompts) for row in WAYS[way](model, [prompt], min(NEW, 64 - len(prompt)), first_row=i)]
    flat = lambda row: [token for part in row for token in part] if way == "streamed" else getattr(row, "tokens", row)  # noqa: E731
    assert list(map(flat, rows)) == list(map(flat, alone))
    if "beams" not in way:
        assert [len(flat(row)) for row in rows[:: len(rows) // 3]] == [4, 1, NEW]


def test_rows_end_with_their_first_stop_token(model, greedy):
    stop = (greedy.tokens[0][3], greedy.tokens[1][0])
    cut = [row[: min([row.index(s) for s in stop if s in row], default=NEW) + 1] for row in greedy.tokens]
    stopped = generate_tokens(model, PROMPTS, NEW, stop=stop)
    assert stopped.tokens == cut
    assert len(cut[1]) == 1
    assert max(map(len, cut)) > 3
    assert [len(row) for row in stopped.logprobs] == [len(row) for row in cut]


def test_ends_when_every_row_has_stopped(model, greedy, monkeypatch):
    seen = []
    generate = decode._generate
    monkeypatch.setattr(decode, "_generate", lambda *args: seen.append(generate(*args)) or seen[-1])
    generate_tokens(model, PROMPTS[:1] * 4, NEW, stop=[greedy.tokens[0][1]] * 2)
    written = np.asarray(seen[0].logprobs) != 0
    assert written.tolist() == [[True, True] + [False] * (NEW - 2)] * 4


def test_draws_are_reproducible(model):
    draw = lambda **settings: generate_tokens(model, PROMPTS, NEW, WARM, **settings).tokens  # noqa: E731
    assert draw(seed=1) == draw(seed=1)
    assert all(a != b for a, b in zip(draw(seed=1), draw(seed=2), strict=True))
    twice = generate_tokens(model, [[3], [3]], NEW, WARM).tokens
    assert twice[0] != twice[1]


def test_draws_do_not_depend_on_the_split(model):
    """Neither on that of the prompts nor on how many samples are drawn of each."""

    def draw(rows, first_row, samples):
        return generate_tokens(model, PROMPTS[rows], NEW, WARM, seed=7, first_row=first_row, samples=samples).tokens

    whole = draw(slice(0, 4), 0, 3)
    assert len({tuple(row) for row in whole}) == 12
    assert [row for r in range(4) for row in draw(slice(r, r + 1), r, 3)] == whole
    assert draw(slice(0, 4), 0, 1) == whole[::3]
    assert draw(slice(2, 3), 0, 1) != whole[6:7]


def test_cache_in_another_dtype_compiles_once(model, greedy, monkeypatch):
    traced = []
    monkeypatch.setattr(decode, "draw", lambda *args, draw=decode.draw: traced.append(1) or draw(*args))
    near = generate_tokens(model, PROMPTS, 3, cache_dtype="bfloat16", stop=[1])
    assert [row[:2] for row in near.logprobs] != [row[:2] for row in greedy.logprobs]
    np.testing.assert_allclose([row[0] for row in near.logprobs], [row[0] for row in greedy.logprobs], atol=0.1)
    once = len(traced)
    assert once > 0
    others = [[4], [5] * 16, [6] * 9, [7]]
    generate_tokens(model, others, 3, cache_dtype="bfloat16", stop=[2], seed=4, first_row=3)
    assert len(traced) == once
    for sampling in (Sampling(temperature=0.7, top_p=0.9), Sampling(temperature=1.5, top_p=0.5)):
        generate_tokens(model, others, 3, sampling, cache_dtype="bfloat16")
    assert len(traced) == 2 * once


@pytest.mark.parametrize(
    ("arguments", "where", "what"),
    [
        ({"prompts": []}, "prompts", "no prompts"),
        ({"prompts": [[1], []]}, "prompts[1]", "empty prompt"),
        ({"prompts": [[1], [1, 2, 61]]}, "prompts[1][2]", "id 61 is outside of the vocabulary of 61"),
        ({"prompts": [[-1]]}, "prompts[0][0]", "id -1 is outside"),
        ({"prompts": [[1], [1] * 64]}, "prompts[1]", "64 tokens and new ones pass the context of 64"),
        ({"max_new_tokens": 0}, "max_new_tokens", "0 is less than 1"),
        ({"samples": 0}, "samples", "0 is less than 1"),
        ({"prefill_chunk": 0}, "prefill_chunk", "0 is less than 1"),
        ({"top_logprobs": -1}, "top_logprobs", "-1"),
        ({"top_logprobs": 62}, "top_logprobs", "62 is more than 61"),
        ({"top_logprobs": 12, "vocab": 11}, "top_logprobs", "12 is more than 11"),
        ({"vocab": 0}, "vocab", "0 is less than 1"),
        ({"seed": 2**32}, "seed", "4294967296 is more than 4294967295"),
        ({"seed": -1}, "seed", "-1 is less than 0"),
        ({"stop": (1, 61)}, "stop", "61"),
        ({"prompts": "hello"}, "prompts", "'hello' is not a list of lists of ids"),
        ({"prompts": ["hello"]}, "prompts[0]", "'hello' is not a list of ids"),
        ({"prompts": [1, 2, 3]}, "prompts[0]", "1 is not a list of ids"),
        ({"prompts": np.arange(3)}, "prompts[0]", "0 is not a list of ids"),
        ({"prompts": [[1, 2.7]]}, "prompts[0][1]", "2.7 is not a whole number"),
        ({"stop": 2}, "stop", "2 is not a list of ids"),
        ({"stop": ["\n"]}, "stop[0]", "'\\n' is not a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens", "2.5 is not a whole number"),
        ({"sampling": 0.8}, "sampling", "0.8 is not a Sampling"),
        ({"first_row": 2**31}, "first_row", "2147483648 is more than"),
        ({"cache_dtype": "int8"}, "cache_dtype", "neither weights nor caches are kept in int8"),
    ],
)
def test_bad_input(model, monkeypatch, arguments, where, what):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests only
    monkeypatch.setattr(decode, "_generate", lambda *args: pytest.fail("compiled"))
    with pytest.raises(ConfigError) as error:
        generate_tokens(model, **{"prompts": [[1, 2]], "max_new_tokens": 5, **arguments})
    assert error.value.where == where
    assert what in error.value.what
    assert error.value.next
    assert "shift=true" not in error.value.next  # which Python does not know


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, 1e-40, float("nan"), float("inf"))),
        *(("top_k", value) for value in (0, -3)),
        *(("top_p", value) for value in (0.0, 1.1, float("nan"))),
        *(("min_p", value) for value in (-0.1, 1.1)),
        *(("repetition_penalty", value) for value in (0.0, 1e-40, -1.0, float("inf"))),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("inf")),
    ],
)
def test_bad_settings(name, value):
    with pytest.raises(ConfigError, match=str(value)) as error:
        Sampling(**{name: value})
    assert error.value.where == name
    assert error.value.next


def test_settings_that_are_no_numbers(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests only
    for name, wrong in [*((name, "0.5") for name in Sampling.__dataclass_fields__), ("top_k", 1.5), ("temperature", None)]:
        with pytest.raises(ConfigError, match=f"{wrong!r} is not a (whole )?number") as error:
            Sampling(**{name: wrong})
        assert error.value.where == name
    given = Sampling(temperature=jax.numpy.float32(0.5), top_k=np.int64(5))
    assert [type(value) for value in (given.temperature, given.top_k)] == [float, int]


def test_tokens_that_no_cache_holds(model):
    with pytest.raises(ConfigError, match="9 tokens do not fit into a cache of 8 slots"):
        model.hidden(jax.numpy.zeros((1, 9), int), cache=model.init_cache(1, 8))
    _, cache = model.hidden(jax.numpy.zeros((1, 6), int), cache=model.init_cache(1, 8))
    with pytest.raises(ConfigError, match="6 and 3 tokens do not fit into a cache of 8 slots"):
        model.hidden(jax.numpy.zeros((1, 3), int), cache=cache)


def test_tokens_that_are_no_array_of_two_axes(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests only
    for tokens, found in ((jax.numpy.arange(5), "shape (5,)"), ([[1, 2, 3]], "list")):
        for call in (model, lambda tokens: trace(model, tokens, ("residual",))):
            with pytest.raises(ConfigError, match="an array \\[batch, seq\\], and not") as error:
                call(tokens)
            assert error.value.what.endswith(found)


@pytest.mark.parametrize("penalty", [0.7, 1.4])
def test_penalised_equals_transformers(model, reference, penalty):
    prompts = [[5, 6, 7, 8], [60, 2, 33, 33], [12] * 4]  # of one length: transformers counts padding as part of a row
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "repetition_penalty": penalty}
    theirs = reference.generate(torch.tensor(prompts), attention_mask=torch.ones(3, 4, dtype=torch.long), **settings)[:, 4:].tolist()
    ours = generate_tokens(model, prompts, NEW, Sampling(repetition_penalty=penalty)).tokens
    assert ours == theirs
    assert ours != generate_tokens(model, prompts, NEW).tokens


def test_penalties_count_what_was_generated(model):
    """A frequency penalty beyond all logits draws every id once before any comes again; one on presence does not see the prompt."""
    rows = generate_tokens(model, [[5], [6, 6]], 61, Sampling(frequency_penalty=1e4)).tokens
    assert [sorted(row) for row in rows] == [list(range(61))] * 2
    once = generate_tokens(model, [[5], [6, 6]], 61, Sampling(presence_penalty=1e4)).tokens
    assert [sorted(row) for row in once] == [list(range(61))] * 2


def test_top_logprobs(model, greedy):
    new = generate_tokens(model, PROMPTS, NEW, WARM, top_logprobs=61)
    for tokens, logprobs, top in zip(*new, strict=True):
        for token, logprob, place in zip(tokens, logprobs, top, strict=True):
            assert len({i for i, _ in place}) == 61
            np.testing.assert_allclose(sum(np.exp(x) for _, x in place), 1, atol=1e-5)
            assert [x for _, x in place] == sorted((x for _, x in place), reverse=True)
            np.testing.assert_allclose(dict(place)[token], logprob, atol=1e-6)
    first = generate_tokens(model, PROMPTS, NEW, top_logprobs=1)
    assert [[place[0][0] for place in row] for row in first.top] == greedy.tokens


def test_ids_that_are_not_the_tokenizers(model, reference):
    """They are neither drawn nor told; what is told stays the model's own probability. As in transformers when they are suppressed."""
    new = generate_tokens(model, PROMPTS, NEW, WARM, top_logprobs=11, vocab=11)
    for tokens, logprobs, top in zip(*new, strict=True):
        assert max(tokens) < 11
        assert all({i for i, _ in place} == set(range(11)) for place in top)
        np.testing.assert_allclose([dict(place)[token] for token, place in zip(tokens, top, strict=True)], logprobs, atol=1e-6)
    theirs = continued(reference, PROMPTS, suppress_tokens=list(range(11, 61)))
    ours = generate_tokens(model, PROMPTS, NEW, vocab=11, stop=[2]).tokens  # there an end of the text, after which comes padding
    assert [row + [0] * (NEW - len(row)) for row in ours] == theirs
    assert generate_tokens(model, PROMPTS, NEW, vocab=99).tokens == generate_tokens(model, PROMPTS, NEW).tokens


def test_shift_leaves_out_the_beginning(model):
    long = [*range(50)] * 2
    room = 64 - NEW
    assert generate_tokens(model, [long], NEW, shift=True).tokens == generate_tokens(model, [long[-room:]], NEW).tokens
    bos = model.config.tokens.bos
    fitted = lambda prompt, new: request.fitting(model, [prompt], new, shift=True)[0]  # noqa: E731
    assert fitted([bos, *long], NEW) == [bos, *long[-room + 1 :]]
    assert fitted([bos, *long], 63) == long[-1:]
    assert fitted([bos, 5, 6], 61) == [bos, 5, 6]
    assert generate_tokens(model, [long], 100, shift=True).tokens == generate_tokens(model, [long[-1:]], 63).tokens


@pytest.mark.parametrize(("chunk", "widths"), [(12, {8}), (16, {16}), (500, {16})])
def test_how_much_goes_through_at_a_time(model, monkeypatch, chunk, widths):
    rows, rule = request.prepared(model, PROMPTS, NEW, Sampling(), prefill_chunk=chunk)
    seen, hidden = [], type(model).hidden
    monkeypatch.setattr(type(model), "hidden", lambda self, tokens, **rest: seen.append(tokens.shape[1]) or hidden(self, tokens, **rest))
    eqx.filter_eval_shape(decode.prefilled, model, rows, rule, 32)
    assert set(seen) == widths


def test_a_cache_has_whole_lines_and_no_token_is_drawn_for_them(model):
    sizes = {(16, 20): 64, (100, 383): 128, (300, 383): 384, (4096, 4111): 4096, (4097, 4111): 4160}
    assert {size: decode.slots_for(*size) for size in sizes} == sizes
    rows, rule = request.prepared(model, PROMPTS, NEW, Sampling())
    assert int(decode._generate(model, rows, rule).t) == NEW


def test_all_of_a_prompt_goes_through_at_once_where_attention_keeps_no_scores(model, monkeypatch):
    """Unless the prompts are many; not after other tokens, of a stacked model, or with an attention that may keep them."""
    laid_out = for_decoding(model)
    empty, own = emptied(laid_out.init_cache(1, 8)), eqx.tree_at(lambda m: m.blocks[0].attention, laid_out, jax.numpy.tanh)
    chunk = lambda *shape, model=laid_out, cache=empty: decode.chunk_for(model, cache, jax.numpy.zeros(shape, int))  # noqa: E731
    assert chunk(4, 4096) == 512
    monkeypatch.setattr("llama_eqx.model.kernel.keeps_no_scores", lambda dtype, head_dim: True)
    assert [chunk(4, 4096), chunk(8, 4096), chunk(16, 4096)] == [4096, 4096, 512]
    assert chunk(4, 4096, cache=with_length(empty, 0)) == chunk(4, 4096, model=own) == 512
    assert chunk(4, 4096, model=model, cache=emptied(model.init_cache(1, 8))) == 512


@pytest.mark.parametrize("every", [1, 5, 100])
def test_streamed_equals_at_once(model, greedy, every):
    coming, parts, stop = stream_tokens(model, PROMPTS, NEW, every=every, stop=greedy.tokens[0][3:4]), [], greedy.tokens[0][3]
    while True:
        try:
            parts.append(next(coming))
        except StopIteration as end:
            whole = end.value
            break
    assert whole.tokens == generate_tokens(model, PROMPTS, NEW, stop=[stop]).tokens
    assert [[token for part in parts for token in part[row]] for row in range(4)] == whole.tokens
    assert max(len(tokens) for part in parts for tokens in part) == min(every, NEW - 1)


def test_the_cache_is_handed_on_in_place(model, greedy):
    """It is donated from one call to the next, and never there twice; the model stays."""
    rows, rule = request.prepared(model, PROMPTS, NEW, Sampling(), stop=greedy.tokens[0][3:4])
    state = stream._begin(model, rows, rule)
    stream._advance((model, rule, jax.numpy.asarray(2)), state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model))


def test_rows_that_the_caller_ends(model, greedy):
    parts = list(stream_tokens(model, PROMPTS, NEW, every=2, ended=lambda rows: [len(row) >= 4 for row in rows]))
    assert [[token for part in parts for token in part[row]] for row in range(4)] == [row[:5] for row in greedy.tokens]
