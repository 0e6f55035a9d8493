"""Beam search against transformers' own: tokens of every beam, and their scores."""

import numpy as np
import pytest
import torch

from llama_eqx.errors import ConfigError
from llama_eqx.generation.decode import generate_tokens
from llama_eqx.generation.search import search_beams

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [60, 2, 33], [12] * 16]
NEW = 12


def theirs(reference, prompts, stop, **settings):
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings |= {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": list(stop) or None}
    beams = settings["num_beams"]
    found = reference.generate(
        tokens, attention_mask=mask, num_return_sequences=beams, return_dict_in_generate=True, output_scores=True, **settings
    )
    rows = []
    for row in found.sequences[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
        rows.append(row[:end])
    return [rows[i : i + beams] for i in range(0, len(rows), beams)], found.sequences_scores.reshape(-1, beams).numpy()


@pytest.mark.parametrize(
    ("stops", "beams", "length_penalty", "early_stopping"),
    [(0, 3, 2.0, False), (1, 4, 0.0, True), (3, 2, 0.5, "never"), (1, 3, -1.0, False), (3, 3, 1.0, False)],
)
def test_equals_transformers(model, reference, stops, beams, length_penalty, early_stopping):
    # Ids that are often the best, and those that are so first.
    greedy = generate_tokens(model, PROMPTS, NEW, top_logprobs=3)
    often = sorted({token for row in greedy.tokens for token in row[2::3]})
    stop = (*often[:stops], *(token for token, _ in greedy.top[0][0][:stops]))
    settings = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    rows, scores = theirs(reference, PROMPTS, stop, num_beams=beams, **settings)
    found = search_beams(model, PROMPTS, NEW, beams, stop=stop, **settings)
    assert [[each.tokens for each in row] for row in found] == rows
    np.testing.assert_allclose([[each.score for each in row] for row in found], scores, rtol=3e-6)
    assert not stop or any(len(row) < NEW for beams in rows for row in beams)


def test_one_beam_is_greedy(model):
    greedy = generate_tokens(model, PROMPTS, NEW).tokens
    assert [row[0].tokens for row in search_beams(model, PROMPTS, NEW, 1)] == greedy
    assert [row[0].tokens for row in search_beams(model, PROMPTS, NEW, 3)] != greedy


def test_ids_that_are_not_the_tokenizers(model):
    assert all(max(each.tokens) < 11 for row in search_beams(model, PROMPTS, NEW, 3, vocab=11) for each in row)
    with pytest.raises(ConfigError, match="the vocabulary has 11"):
        search_beams(model, PROMPTS, NEW, 6, vocab=11)


@pytest.mark.parametrize(("beams", "what"), [(0, "0 is less than 1"), (31, "31 beams need 62 tokens, and the vocabulary has 61")])
def test_beams_without_tokens(model, beams, what):
    with pytest.raises(ConfigError, match=what):
        search_beams(model, PROMPTS, NEW, beams)


def test_settings_of_draws_are_refused(model):
    with pytest.raises(ConfigError, match="beams are not drawn: samples, seed would change nothing"):
        search_beams(model, PROMPTS, NEW, 3, seed=1, samples=2)
