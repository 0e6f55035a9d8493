"""The order of an epoch is held against what a random permutation would be, with scipy's tests; a weaker one fails them."""

import itertools
import math

import grain
import numpy as np
import pytest
from scipy import stats

from llama_eqx.data import shuffle
from llama_eqx.data.shuffle import Shuffle


def order(size, seed=0, epoch=0):
    return Shuffle([size], seed)(np.zeros(size, np.int64), np.arange(size) + epoch * size)


def neighbours(orders):
    """The p-value of the correlations between neighbours, which would be normal around -1/n with a variance of about 1/n."""
    scores = [(np.corrcoef(found[:-1], found[1:])[0, 1] + 1 / len(found)) * math.sqrt(len(found)) for found in orders]
    return stats.kstest(scores, "norm").pvalue


@pytest.mark.parametrize("size", [*range(1, 40), 97, 1024, 33_503, 65_536, 65_537])
def test_every_row_is_there_once_in_every_epoch(size):
    for epoch in range(3):
        assert np.array_equal(np.sort(order(size, epoch=epoch)), np.arange(size))


def test_all_orders_of_four_rows_are_as_frequent():
    epochs = 20_000
    found = Shuffle([4], 1)(np.zeros(4 * epochs, np.int64), np.arange(4 * epochs)).reshape(epochs, 4)
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("size", [1000, 33_503])
def test_neighbours_are_not_correlated_and_those_of_the_library_are(size):
    assert neighbours([order(size, epoch=epoch) for epoch in range(30)]) > 0.001
    if size == 33_503:
        datasets = (grain.MapDataset.range(size).shuffle(seed=seed) for seed in range(3))
        assert neighbours([np.array([dataset[i] for i in range(size)]) for dataset in datasets]) < 1e-6


def test_too_few_rounds_would_be_seen(monkeypatch):
    monkeypatch.setattr(shuffle, "ROUNDS", 2)
    assert neighbours([order(33_503, epoch=epoch) for epoch in range(30)]) < 0.001


def test_the_start_of_an_epoch_is_a_fair_sample():
    """Means of the first hundredth of the rows, over epochs, and the number of rows that stay in their place (Poisson with mean 1)."""
    orders = [order(10_007, seed=5, epoch=epoch) for epoch in range(200)]
    means = [found[:100].mean() for found in orders]
    assert stats.kstest(means, stats.norm(5003, 10_007 / math.sqrt(12 * 100)).cdf).pvalue > 0.001
    fixed = np.bincount([(found == np.arange(10_007)).sum() for found in orders], minlength=8)
    expected = stats.poisson(1).pmf(np.arange(4)) * 200
    assert stats.chisquare([*fixed[:4], fixed[4:].sum()], [*expected, 200 - expected.sum()]).pvalue > 0.001


def test_epochs_seeds_and_sources_have_orders_of_their_own():
    both = Shuffle([5003, 5003], 0)
    orders = [both(np.full(5003, source), np.arange(5003)) for source in range(2)]
    orders += [order(5003, seed=seed, epoch=epoch) for seed, epoch in [(0, 1), (1, 0), (1, 1), (2, 0)]]
    for a, b in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(5003)
        assert (a == b).sum() < 10


def test_more_than_two_to_the_33_rows():
    size = 2**33 + 12_345
    draws = np.random.default_rng(0).choice(size, 100_000)
    found = Shuffle([size], 0)(np.zeros(len(draws), np.int64), draws)
    assert len(np.unique(found)) == len(np.unique(draws))
    assert stats.kstest(found / size, "uniform").pvalue > 0.001
    begun = Shuffle([size], 0)(np.zeros(100_000, np.int64), np.arange(100_000))
    assert stats.kstest(begun / size, "uniform").pvalue > 0.001


def test_a_draw_does_not_depend_on_what_else_is_asked():
    sizes, rng = [1, 7, 1000], np.random.default_rng(0)
    sources, draws = rng.integers(0, 3, 500), rng.integers(0, 10_000, 500)
    shuffled = Shuffle(sizes, 3)
    alone = [int(shuffled(sources[i : i + 1], draws[i : i + 1])[0]) for i in range(500)]
    assert shuffled(sources, draws).tolist() == alone
