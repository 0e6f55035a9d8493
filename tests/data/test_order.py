import itertools

import numpy as np
import pytest

from llama_eqx.data.order import Order, chained, digest, interleaved


@pytest.mark.parametrize("shares", [[1], [7, 3], [14, 5, 1], [1, 1, 1], [90, *[1] * 10], [9000, 777, 200, 23], [1, 9999]])
def test_proportions_are_exact_on_every_prefix(shares):
    found = interleaved(shares)
    assert len(found) == sum(shares)
    drawn = np.cumsum(found[:, None] == np.arange(len(shares)), 0)
    due = np.outer(np.arange(1, len(found) + 1), shares) / sum(shares)
    assert np.abs(drawn - due).max() < 1
    assert drawn[-1].tolist() == shares


def test_each_source_is_shuffled_and_repeated_on_its_own():
    sizes, shares = [50, 7, 33], [14, 5, 1]
    order = Order(sizes, shares, seed=3)
    rows = order(np.arange(4000))
    firsts = np.cumsum([0, *sizes])
    for i, size in enumerate(sizes):
        mine = rows[(rows >= firsts[i]) & (rows < firsts[i + 1])] - firsts[i]
        assert len(mine) == 4000 * shares[i] // 20
        epochs = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(epochs, 1) == np.arange(size)).all()
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 0.95 * len(epochs) > 1
        assert order.epochs(4000)[i] == len(mine) / size
    for count in (0, 1, 19, 20, 77):
        drawn = [((rows[:count] >= a) & (rows[:count] < b)).sum() for a, b in itertools.pairwise(firsts)]
        assert order.epochs(count) == [n / size for n, size in zip(drawn, sizes, strict=True)]


def test_a_sample_is_a_function_of_seed_and_index():
    order, index = Order([1000, 10], [3, 1], seed=0), np.random.default_rng(0).integers(0, 10**12, 300)
    assert order(index).tolist() == [int(order(np.array([i]))[0]) for i in index]
    assert (order(index) != Order([1000, 10], [3, 1], seed=1)(index)).any()


def test_the_ledger_tells_rows_their_order_and_batches_apart():
    rows = np.arange(8)
    digests = {digest(rows), digest(rows[::-1]), digest(rows[:7]), digest(rows + 1)}
    assert len(digests) == 4
    a, b = digest(rows), digest(rows[::-1])
    assert len({chained(chained(0, first), last) for first in (a, b) for last in (a, b)}) == 4
    assert float(chained(0, a)).is_integer()
    assert int(float(chained(0, a))) == chained(0, a)
