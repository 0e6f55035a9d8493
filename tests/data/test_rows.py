"""Rows against what a person would write down for them, document by document."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from llama_eqx.data.packing import pack_index
from llama_eqx.data.rows import Documents, Joined, Packed, Shifted, Windows
from llama_eqx.data.shards import Split
from llama_eqx.errors import DataError

SEQ = 8


@pytest.fixture
def corpus(split):
    """Two shards of documents whose tokens count upwards; a hundred more for each next document."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 40)
    documents = [100 * i + np.arange(1, length + 1) for i, length in enumerate(lengths, 1)]
    return split(documents[:25], documents[25:])


def packed(split, **options):
    settings = {"learned": None, "fingerprint": "f", "seq_len": SEQ, "fill": "packed", "long_documents": "cut", **options}
    return Packed(split, settings["learned"], pack_index(split, **settings), SEQ)


def sources(corpus):
    return {"windows": Windows(corpus, SEQ), "documents": Documents(corpus, SEQ), "packed": packed(corpus)}


def stream(split):
    return np.concatenate([split.document(i) for i in range(split.documents)]).astype(int)


def test_windows_share_the_token_at_which_they_meet(split):
    rows = Windows(split([np.arange(20)]), 4)
    batch = rows.read(np.array([2, 0, -1]))
    assert batch.tokens.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3], [0] * 4]
    assert batch.targets.tolist() == [[9, 10, 11, 12], [1, 2, 3, 4], [0] * 4]
    assert batch.loss_mask.tolist() == [[1.0] * 4, [1.0] * 4, [0.0] * 4]
    assert (batch.segment_ids, batch.positions) == (None, None)
    assert (len(rows), rows.targets, rows.counted(np.array([2, 0, -1]))) == (4, 16, 8)


@pytest.mark.parametrize(("tokens", "count"), [(5, 1), (8, 1), (9, 2)])
@pytest.mark.parametrize("kind", [Windows, Documents])
def test_every_window_that_fits_is_there(split, kind, tokens, count):
    rows = kind(split([np.arange(tokens)]), 4)
    assert len(rows) == count
    assert rows.read(np.arange(count)).targets[-1, -1] == 4 * count


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kind", [Windows, Documents])
def test_a_split_without_a_row_says_what_to_change(split, kind, tokens, monkeypatch):
    monkeypatch.setattr(Split, "source", lambda self, number: f"{number}.txt")
    with pytest.raises(DataError, match=f"val has {tokens} tokens, a row needs 5") as error:
        kind(split([np.arange(tokens)], name="val"), 4)
    assert error.value.where == "0.txt"
    assert error.value.next.startswith("data.rows=packed")
    assert "train.seq_len=0" not in str(error.value)


def test_documents_are_segments_with_positions_and_targets_of_their_own(split):
    rows = Documents(split([[1, 2, 3], [11, 12], [21, 22, 23, 24, 25, 26, 27]], [[31], [41, 42, 43]]), 4)
    batch = rows.read(np.array([0, 1, 2, -1]))
    assert batch.tokens.tolist() == [[1, 2, 3, 11], [12, 21, 22, 23], [24, 25, 26, 27], [0] * 4]
    assert batch.targets.tolist() == [[2, 3, 0, 12], [0, 22, 23, 24], [25, 26, 27, 0], [0] * 4]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 0], [0] * 4]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2], [1, 2, 2, 2], [1, 1, 1, 1], [0] * 4]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 2, 3], [0] * 4]
    assert [(a, b) for _, a, b in rows.pieces(0)] == [(0, 3), (3, 5)]
    assert [(a, b) for _, a, b in rows.pieces(2)] == [(8, 12)]


def test_packed_rows_hold_whole_documents(split):
    rows = packed(split([[1, 2, 3], [11, 12, 13, 14, 15, 16, 17, 18]], [[21, 22, 23, 24]]), long_documents="refuse")
    batch = rows.read(np.array([1, 0, -1]))
    assert batch.tokens.tolist() == [[1, 2, 21, 22, 23, 0, 0, 0], [11, 12, 13, 14, 15, 16, 17, 0], [0] * 8]
    assert batch.targets.tolist() == [[2, 3, 22, 23, 24, 0, 0, 0], [12, 13, 14, 15, 16, 17, 18, 0], [0] * 8]
    assert batch.loss_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 7 + [0], [0] * 8]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 0, 0, 0], [1] * 7 + [0], [0] * 8]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 0], [0] * 8]


def test_the_loss_counts_what_is_learned(split):
    rows = packed(split([[1, 2, 3, 4], [11, 12, 13]]), learned=split([[0, 0, 1, 1], [0, 1, 0]], vocab=2))
    assert rows.read(np.array([0])).loss_mask.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0]]
    assert (rows.targets, rows.counted(np.array([0, 0]))) == (3, 6)


@pytest.mark.parametrize("kind", ["documents", "packed"])
def test_every_token_but_the_first_of_a_document_is_a_target_once_and_knows_its_document(corpus, kind):
    rows = sources(corpus)[kind]
    batch = rows.read(np.arange(len(rows)))
    counted = batch.loss_mask == 1
    assert (batch.targets[counted] == batch.tokens[counted] + 1).all()
    seen = sorted(batch.targets[counted].tolist())
    last = rows.seq_len * len(rows) if kind == "documents" else len(stream(corpus))
    wanted = sorted(token for token in stream(corpus)[: last + 1].tolist() if token % 100 > 1)
    assert seen == wanted
    assert rows.targets == len(seen)
    for tokens, segments, positions in zip(batch.tokens, batch.segment_ids, batch.positions, strict=True):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert (np.diff(np.flatnonzero(inside)) == 1).all()
            assert (np.diff(tokens[inside]) == 1).all()
            assert positions[inside].tolist() == list(range(inside.sum()))


@pytest.mark.parametrize("kind", ["windows", "documents", "packed", "joined"])
def test_rows_are_functions_of_their_numbers(corpus, kind):
    rows = {**sources(corpus), "joined": Joined(list(sources(corpus).values()))}[kind]
    numbers = np.random.default_rng(0).permutation(len(rows))
    whole = rows.read(numbers)
    for line, number in enumerate(numbers):
        alone = rows.read(np.array([number]))
        assert all((a[0] == b[line]).all() for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True))
        assert rows.counted(np.array([number])) == alone.loss_mask.sum()
        ids = np.concatenate([split.read(begin, end) for split, begin, end in rows.pieces(int(number))])
        assert set(ids.tolist()) == {*alone.tokens[0].tolist(), *alone.targets[0][alone.loss_mask[0] > 0].tolist()} - {0}
    assert rows.counted(numbers) == whole.loss_mask.sum() == rows.targets
    assert whole.tokens.dtype == whole.targets.dtype == (np.int32 if kind == "joined" else np.uint16)
    assert whole.loss_mask.dtype == np.float32


def test_few_files_of_many_sources_are_open_at_once(split):
    """A process often has no more than 1024 of them."""
    (first,) = split([np.arange(20)]).shards
    shards = [dataclasses.replace(first, path=first.path.with_name(f"{i}")) for i in range(600)]
    for shard in shards:
        for kind in shard.content:
            shard.file(kind).hardlink_to(first.file(kind))
    before = len(os.listdir("/dev/fd"))
    joined = Joined([Windows(Split(tuple(part), "train"), 8) for part in (shards[:300], shards[300:])])
    joined.read(np.arange(len(joined)))
    assert len(os.listdir("/dev/fd")) - before < 900


def test_a_dataset_that_is_opened_again_is_read_again(split):
    """Another may have been prepared in its place, in the same notebook and with as many tokens."""
    (shard,) = split([np.arange(20)]).shards
    assert Windows(Split((shard,), "train"), 8).read(np.array([0])).tokens[0, 0] == 0
    other = np.load(shard.file("ids")) + 7
    shard.file("ids").unlink()
    np.save(shard.file("ids"), other)
    again = Split((dataclasses.replace(shard),), "train")
    assert Windows(again, 8).read(np.array([0])).tokens[0, 0] == 7


def test_joined_rows_are_segmented_when_some_are(corpus, split):
    windows, documents = Windows(split([np.arange(20)]), SEQ), Documents(corpus, SEQ)
    joined = Joined([windows, documents])
    batch = joined.read(np.array([2, 1, -1]))
    assert (batch.tokens[0] == documents.read(np.array([0])).tokens[0]).all()
    assert batch.segment_ids[1].tolist() == [1] * SEQ
    assert batch.segment_ids[2].tolist() == [0] * SEQ
    assert batch.positions[1].tolist() == list(range(SEQ))
    assert Joined([windows, windows]).read(np.array([3])).segment_ids is None


def test_bytes_go_with_the_targets(corpus):
    for rows in sources(corpus).values():
        assert rows.bytes == pytest.approx(corpus.bytes, rel=0.1)
    whole = packed(corpus)
    assert (whole.bytes, whole.targets) == (corpus.bytes, corpus.tokens - corpus.documents)


@pytest.mark.parametrize("kind", ["windows", "documents", "packed"])
def test_an_id_that_is_not_in_the_vocabulary_is_named(split, kind):
    made = split([[1, 2, 3, 4]], [[5, 6, 7, 8, 9, 10]], vocab=11)
    rows = {"windows": Windows(made, 2), "documents": Documents(made, 2), "packed": packed(made)}[kind]
    path = made.shards[1].file("ids")
    ids = np.load(path)
    ids[3] = 11
    np.save(path, ids)
    with pytest.raises(DataError, match="id 11 is not in the vocabulary of 11") as error:
        rows.read(np.arange(len(rows)))
    assert error.value.where == f"{path}, offset 3"


@pytest.mark.parametrize("kind", ["windows", "documents", "packed", "joined"])
def test_an_offset_is_added_to_positions_and_changes_nothing_else(corpus, kind):
    rows = Joined(list(sources(corpus).values())) if kind == "joined" else sources(corpus)[kind]
    shifted, numbers = Shifted(rows, 1000), np.array([2, -1, 0])
    plain, moved = rows.read(numbers), shifted.read(numbers)
    before = np.broadcast_to(np.arange(SEQ), (3, SEQ)) if kind == "windows" else plain.positions
    assert np.array_equal(moved.positions, before + 1000)
    assert moved.positions.dtype == np.int32
    assert (moved.segment_ids is None) == (kind == "windows")
    assert jax.tree.all(jax.tree.map(np.array_equal, dataclasses.replace(moved, positions=plain.positions), plain))
    assert (len(shifted), shifted.targets, shifted.bytes, shifted.seq_len) == (len(rows), rows.targets, rows.bytes, SEQ)
    assert (shifted.segmented, shifted.counted(numbers), shifted.first()) == (rows.segmented, rows.counted(numbers), rows.first())
    assert (shifted.pieces(2), shifted.source(2)) == (rows.pieces(2), rows.source(2))
