import itertools
import json

import numpy as np
import pytest

from llama_eqx.data.packing import pack, pack_index
from llama_eqx.data.shards import DELETE
from llama_eqx.errors import DataError


def best_fit(sizes, capacity):
    """The room that is left in each row, by the definition: a piece at a time, largest first."""
    room = []
    for size in sorted(sizes, reverse=True):
        fitting = [(free, row) for row, free in enumerate(room) if free >= size]
        row = min(fitting)[1] if fitting else len(room)
        room[row:] = [(room[row] if fitting else capacity) - size, *room[row + 1 :]]
    return sorted(room)


@pytest.mark.parametrize("seed", range(40))
def test_pieces_are_packed_by_best_fit(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 40))
    sizes = rng.integers(1, capacity + 1, rng.integers(0, 150))
    rows = pack(sizes, capacity)
    count = rows.max() + 1 if len(rows) else 0
    assert set(rows.tolist()) == set(range(count))
    assert sorted((capacity - np.bincount(rows, sizes, minlength=count)).astype(int).tolist()) == best_fit(sizes.tolist(), capacity)


def test_packing_wastes_little():
    sizes = np.minimum(np.random.default_rng(0).geometric(1 / 700, 20_000), 2048)
    assert sizes.sum() / 2048 / (pack(sizes, 2048).max() + 1) > 0.999


def index_of(split, *, seq_len=8, fill="packed", long_documents="refuse", learned=None, fingerprint="f"):
    return pack_index(split, learned, fingerprint, seq_len, fill, long_documents)


def rows_of(index):
    """The pieces of each row as (begin, length)."""
    pieces = list(zip(index.begins.tolist(), index.lengths.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(index.firsts, index.firsts[1:], strict=False)]


def documents(*lengths):
    return [np.full(length, i + 1) for i, length in enumerate(lengths)]


def test_every_document_is_in_one_row_with_room_for_its_inputs(split):
    index = index_of(split(documents(9, 2, 4), documents(7, 5)))
    assert rows_of(index) == [[(0, 9)], [(15, 7)], [(9, 2), (11, 4), (22, 5)]]
    assert index.counted.tolist() == [8, 6, 8]


def test_one_document_a_row(split):
    index = index_of(split(documents(9, 2, 4), documents(7, 5)), fill="single")
    assert rows_of(index) == [[(0, 9)], [(9, 2)], [(11, 4)], [(15, 7)], [(22, 5)]]


def test_a_document_of_one_token_has_nothing_to_learn(split):
    assert rows_of(index_of(split(documents(1, 3, 1)))) == [[(1, 3)]]
    with pytest.raises(DataError, match="no document with a token to learn"):
        index_of(split(documents(1, 1)), fingerprint="g")


def test_a_long_document_is_refused_or_cut(split):
    long = split(documents(3, 26, 10), name="val")
    (long.shards[0].path.parent / "index.json").write_text(json.dumps({"sources": [{"name": "a.jsonl"}]}))
    with pytest.raises(DataError, match="2 of 3 documents of val are longer than the 9 tokens of a row, the longest with 26") as error:
        index_of(long)
    assert "data.long_documents=cut" in error.value.next
    assert "data.rows=documents" in error.value.next
    assert error.value.next.endswith("train.seq_len=25 makes rows long enough")
    with pytest.raises(DataError, match="longer than") as error:  # of conversations
        index_of(long, learned=split([[1] * 3, [1] * 26, [1] * 10], vocab=2), fingerprint="talk")
    assert "data.rows" not in error.value.next
    assert error.value.where == "a.jsonl:2"
    index = index_of(long, long_documents="cut")
    assert sorted(itertools.chain(*rows_of(index))) == [(0, 3), (3, 9), (11, 9), (19, 9), (27, 2), (29, 9), (37, 2)]
    assert index.counted.sum() == 2 + 25 + 9


def test_rows_are_counted_and_kept_by_what_is_learned(split):
    texts = split(documents(4, 3, 12, 1), documents(1, 5, 1))
    learned = split([[0, 0, 1, 1], [1, 0, 0], [0] * 9 + [1] * 3, [1]], [[1], [1, 1, 0, 1, 0], [1]], vocab=2)
    index = index_of(texts, learned=learned, fill="single", long_documents="cut")
    # The second has only its first token marked, which is no target, and the first piece of the third none. Single tokens are no targets.
    assert rows_of(index) == [[(0, 4)], [(15, 4)], [(21, 5)]]
    assert index.counted.tolist() == [2, 3, 2]


def test_an_index_is_made_once_and_for_its_settings(split, monkeypatch):
    made = split(documents(3, 4))
    first = index_of(made)
    monkeypatch.setattr("llama_eqx.data.packing._index", lambda *_: pytest.fail("made again"))
    assert rows_of(index_of(made)) == rows_of(first)
    for other in ({"fingerprint": "g"}, {"seq_len": 7}, {"fill": "single"}, {"long_documents": "cut"}):
        with pytest.raises(pytest.fail.Exception, match="made again"):
            index_of(made, **other)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: np.load(folder / "begins.npy", mmap_mode="r+").fill(1),
        lambda folder: np.save(folder / "lengths.npy", np.zeros(1)),
        lambda folder: (folder / "firsts.npy").unlink(),
        lambda folder: (folder / "sha256.json").write_text("[]"),
    ],
)
def test_a_damaged_index_is_named(split, cache, damage):
    made = split(documents(3, 4))
    index_of(made)
    (folder,) = (cache / "packed").iterdir()
    damage(folder)
    with pytest.raises(DataError) as error:
        index_of(made)
    assert (error.value.where, error.value.next) == (str(folder), DELETE)
