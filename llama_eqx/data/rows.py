"""Makes rows of equal length from consecutive documents, in three ways, each a function of the row's number."""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt

from llama_eqx.batch import Batch
from llama_eqx.data.packing import PackIndex
from llama_eqx.data.shard import Edges, token_dtype
from llama_eqx.data.shards import Split
from llama_eqx.errors import DataError

MAPS = 200  # shards mapped at once, of all sources: each holds two file descriptors, and a process often has no more than 1024


class Piece(NamedTuple):
    """The consecutive tokens `begin` up to `end` of a split that a row has as inputs, as targets, or both."""

    split: Split
    begin: int
    end: int


class Rows(abc.ABC):
    """Rows of `seq_len` tokens, numbered from 0, with a target for each token.

    `segmented` rows have segment ids, and positions that begin at 0 in each segment. `targets` is the number of targets in all rows that
    the loss counts. `bytes` is the size in UTF-8 of the text that they stand for.
    """

    seq_len: int
    segmented: bool
    targets: int
    bytes: float

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        """Returns those rows, and a row of padding where a number is -1.

        Raises `DataError` naming shard and offset for an id that is not in the vocabulary, and as `Edges` does.
        """

    @abc.abstractmethod
    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        """How many targets of those rows the loss counts. No token is read for it."""

    @abc.abstractmethod
    def pieces(self, row: int) -> list[Piece]:
        """The pieces of a row, in order."""

    def source(self, row: int) -> int:
        """The number of the row's source, where several are joined."""
        return 0

    def first(self) -> list[int]:
        """The first token of the first row."""
        return self.read(np.zeros(1, np.int64)).tokens[0, :1].tolist()


class Windows(Rows):
    """The stream of all documents in rows of `seq_len` + 1 tokens. The last token of a row is the first of the next, so every token but the
    first is a target. Attention crosses document boundaries. What does not fill a row at the end is left out.

    Raises `DataError` when there is not one row.
    """

    segmented = False

    def __init__(self, split: Split, seq_len: int):
        self._tokens, self.seq_len = Tokens(split, seq_len + 1), seq_len
        self.targets = _count(split, seq_len) * seq_len
        self.bytes = self.targets * split.bytes / split.tokens

    def __len__(self) -> int:
        return self.targets // self.seq_len

    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        ids = self._tokens.windows(rows * self.seq_len)
        mask = np.broadcast_to((rows >= 0).astype(np.float32)[:, None], (len(rows), self.seq_len))
        return Batch(ids[:, :-1], ids[:, 1:], mask)

    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        return int((rows >= 0).sum()) * self.seq_len

    def pieces(self, row: int) -> list[Piece]:
        return [Piece(self._tokens.split, row * self.seq_len, (row + 1) * self.seq_len + 1)]


class Documents(Rows):
    """The rows of `Windows`, with a segment for each document, and no target in another document.

    Raises `DataError` when there is not one row.
    """

    segmented = True

    def __init__(self, split: Split, seq_len: int):
        self._tokens, self.seq_len = Tokens(split, seq_len + 1), seq_len
        self._len = _count(split, seq_len)
        end = self._len * seq_len + 1
        self.targets = end - int(self._tokens.documents_before(np.array([end]))[0])  # all tokens but those that begin a document
        self.bytes = self.targets * split.bytes / max(split.tokens - split.documents, 1)

    def __len__(self) -> int:
        return self._len

    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        ids = self._tokens.windows(rows * self.seq_len)
        begins = np.zeros(ids.shape, bool)
        real = rows >= 0
        firsts = rows[real] * self.seq_len
        for line, starts in zip(np.flatnonzero(real).tolist(), self._tokens.starts(firsts, self.seq_len + 1), strict=True):
            begins[line, starts] = True
        ends = begins[:, 1:].copy()
        begins[:, 0] = True
        lines, columns = np.divmod(np.flatnonzero(begins[:, :-1]), self.seq_len)
        segments, positions = _segments(lines, np.diff(lines * self.seq_len + columns, append=len(rows) * self.seq_len))
        shape = len(rows), self.seq_len
        mask = real[:, None] & ~ends
        if not real.all():
            segments, positions = segments * np.repeat(real, self.seq_len), positions * np.repeat(real, self.seq_len)
        targets = np.where(ends, 0, ids[:, 1:])
        return Batch(ids[:, :-1], targets, mask.astype(np.float32), segments.reshape(shape), positions.reshape(shape))

    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        first = rows[rows >= 0] * self.seq_len + 1
        begun = self._tokens.documents_before(first + self.seq_len) - self._tokens.documents_before(first)
        return len(first) * self.seq_len - int(begun.sum())

    def pieces(self, row: int) -> list[Piece]:
        begin, end = row * self.seq_len, (row + 1) * self.seq_len + 1
        edges = [begin, *self._tokens.split.starts(begin + 1, end).tolist(), end]
        return [Piece(self._tokens.split, a, b) for a, b in itertools.pairwise(edges) if a < end - 1]


class Packed(Rows):
    """Whole documents, or pieces of those longer than a row, placed as an index says. Each is a segment. The rest of a row is padding.

    `learned` says which tokens the loss counts as targets, as in `pack_index`; None counts all.
    """

    segmented = True

    def __init__(self, split: Split, learned: Split | None, index: PackIndex, seq_len: int):
        self._tokens, self._learned = Tokens(split), None if learned is None else Tokens(learned)
        self.index, self.seq_len = index, seq_len
        self.targets, self.bytes = int(index.counted.sum(dtype=np.int64)), split.bytes

    def __len__(self) -> int:
        return len(self.index.counted)

    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        shape = len(rows), self.seq_len
        tokens, targets = (np.zeros(shape, self._tokens.dtype) for _ in range(2))
        segments, positions = (np.zeros(shape, np.int32) for _ in range(2))
        mask = np.zeros(shape, np.float32)
        real = rows >= 0
        firsts = np.where(real, self.index.firsts[rows], 0)
        counts = np.where(real, self.index.firsts[rows + 1] - firsts, 0)
        pieces = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        lines = np.repeat(np.arange(len(rows)), counts)
        begins, places = self.index.begins[pieces], self.index.lengths[pieces].astype(np.int64) - 1
        ends = np.cumsum(places)
        used = np.bincount(lines, places, len(rows)).astype(np.int64)
        at = ends - places - np.repeat(np.cumsum(used) - used, counts)  # the place of a piece in its row

        runs = self._tokens.runs(begins, places + 1)
        for line, first, count, ids in zip(lines.tolist(), at.tolist(), places.tolist(), runs, strict=True):
            tokens[line, first : first + count], targets[line, first : first + count] = ids[:-1], ids[1:]
        for ids in (tokens, targets):
            self._tokens.check(ids, begins, places + 1)
        filled = np.arange(self.seq_len) < used[:, None]
        segments[filled], positions[filled] = _segments(lines, places)
        if self._learned is None:
            mask[filled] = 1
        else:
            for line, first, learned in zip(lines.tolist(), at.tolist(), self._learned.runs(begins + 1, places), strict=True):
                mask[line, first : first + len(learned)] = learned
        return Batch(tokens, targets, mask, segments, positions)

    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        return int(self.index.counted[rows[rows >= 0]].sum(dtype=np.int64))

    def pieces(self, row: int) -> list[Piece]:
        here = slice(*self.index.firsts[row : row + 2].tolist())
        begins, lengths = self.index.begins[here].tolist(), self.index.lengths[here].tolist()
        return [Piece(self._tokens.split, begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]


class Joined(Rows):
    """The rows of several sources, one source after another. If some are segmented, each row of the others is one segment."""

    def __init__(self, sources: Sequence[Rows]):
        self.sources, self.seq_len = tuple(sources), sources[0].seq_len
        self.segmented = any(source.segmented for source in sources)
        self.targets, self.bytes = sum(source.targets for source in sources), sum(source.bytes for source in sources)
        self._firsts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        shape = len(rows), self.seq_len
        tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
        mask = np.zeros(shape, np.float32)
        for source, at, inner in self._parts(rows):
            part = source.read(inner)
            tokens[at], targets[at], mask[at] = part.tokens, part.targets, part.loss_mask
            segments[at] = 1 if part.segment_ids is None else part.segment_ids
            positions[at] = np.arange(self.seq_len) if part.positions is None else part.positions
        return Batch(tokens, targets, mask, *((segments, positions) if self.segmented else ()))

    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        return sum(source.counted(inner) for source, _, inner in self._parts(rows))

    def pieces(self, row: int) -> list[Piece]:
        source, _, inner = self._parts(np.array([row]))[0]
        return source.pieces(int(inner[0]))

    def source(self, row: int) -> int:
        return int(np.searchsorted(self._firsts, row, side="right")) - 1

    def _parts(self, rows: np.ndarray) -> list[tuple[Rows, np.ndarray, np.ndarray]]:
        """For each source that has some of `rows`: the source, the indices into `rows`, and the row numbers in the source."""
        of = np.searchsorted(self._firsts, rows, side="right") - 1
        places = [np.flatnonzero(of == i) for i in range(len(self.sources))]
        return [(self.sources[i], at, rows[at] - self._firsts[i]) for i, at in enumerate(places) if len(at)]


class Shifted(Rows):
    """Other rows with `offset` added to all positions. Nothing else changes: neither what attends to what, nor what is a target."""

    def __init__(self, rows: Rows, offset: int):
        self.rows, self.offset = rows, offset
        self.seq_len, self.segmented, self.targets, self.bytes = rows.seq_len, rows.segmented, rows.targets, rows.bytes

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        batch = self.rows.read(rows)
        positions = np.arange(self.seq_len, dtype=np.int32) if batch.positions is None else batch.positions
        return dataclasses.replace(batch, positions=np.broadcast_to(positions + np.int32(self.offset), batch.tokens.shape))

    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        return self.rows.counted(rows)

    def pieces(self, row: int) -> list[Piece]:
        return self.rows.pieces(row)

    def source(self, row: int) -> int:
        return self.rows.source(row)


class Tokens:
    """Reads many short ranges of a split at once, of any length or of `window` ids each."""

    def __init__(self, split: Split, window: int = 1):
        self.split, self.dtype, self._window = split, token_dtype(split.shards[0].vocab), window
        self._firsts = np.cumsum([0, *(shard.tokens for shard in split.shards)])
        self._documents = np.cumsum([0, *(shard.documents for shard in split.shards)])

    def windows(self, begins: Int[np.ndarray, " count"]) -> UInt[np.ndarray, "count window"]:
        """`window` ids from each of `begins` on, zeros where it is negative. Raises as `check` does."""
        real, lengths = begins >= 0, np.full(len(begins), self._window)
        if not real.all():
            ids = np.zeros((len(begins), self._window), self.dtype)
            if real.any():  # one process's part of the last batch may be all padding
                ids[real] = self.windows(begins[real])
            return ids
        shards, firsts, whole = self._places(begins, lengths)
        if whole.all() and (shards == shards[0]).all():
            ids = self._map(int(shards[0])).windows[firsts]  # takes half the time of row by row
        else:
            ids = np.empty((len(begins), self._window), self.dtype)
            for shard in np.unique(shards[whole]).tolist():
                here = np.flatnonzero(whole & (shards == shard))
                ids[here] = self._map(shard).windows[firsts[here]]
            for row in np.flatnonzero(~whole).tolist():
                ids[row] = self.split.read(int(begins[row]), int(begins[row]) + self._window)
        self.check(ids, begins, lengths)
        return ids

    def check(self, ids: UInt[np.ndarray, "..."], begins: Int[np.ndarray, " count"], lengths: Int[np.ndarray, " count"]) -> None:
        """Raises `DataError` naming shard and offset when one of `ids`, which were read from these ranges, is not in the vocabulary."""
        if ids.size and ids.max() >= self.split.shards[0].vocab:
            for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
                self.split.read(begin, begin + length)

    def runs(self, begins: Int[np.ndarray, " count"], lengths: Int[np.ndarray, " count"]) -> list[np.ndarray]:
        """The ids of each range of tokens, as they are on disk."""
        found = []
        places = (*self._places(begins, lengths), begins, begins + lengths)
        for shard, first, fits, begin, end in zip(*(array.tolist() for array in places), strict=True):
            found.append(self._map(shard).ids[first : first + end - begin] if fits else self.split.read(begin, end))
        return found

    def starts(self, begins: Int[np.ndarray, " count"], length: int) -> list[np.ndarray]:
        """Which of the `length` tokens from each of `begins` on begin a document, as offsets from it."""
        found = [np.empty(0, np.int64)] * len(begins)
        shards, firsts, whole = self._places(begins, np.full(len(begins), length))
        for shard in np.unique(shards[whole]).tolist():
            here = np.flatnonzero(whole & (shards == shard))
            for row, starts in zip(here.tolist(), self._map(shard).edges.within(firsts[here], firsts[here] + length), strict=True):
                found[row] = starts - firsts[row]
        for row in np.flatnonzero(~whole).tolist():
            found[row] = self.split.starts(int(begins[row]), int(begins[row]) + length) - begins[row]
        return found

    def documents_before(self, tokens: Int[np.ndarray, " count"]) -> Int[np.ndarray, " count"]:
        """How many documents begin before each token."""
        found, shards = np.empty(len(tokens), np.int64), np.searchsorted(self._firsts[1:-1], tokens, side="right")
        for shard in np.unique(shards).tolist():
            here = shards == shard
            found[here] = self._documents[shard] + self._map(shard).edges.before(tokens[here] - self._firsts[shard])
        return found

    def _places(self, begins: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The shard in which each read begins, at which of its ids, and whether the read ends in that shard."""
        shards = np.searchsorted(self._firsts[1:-1], begins, side="right")
        return shards, begins - self._firsts[shards], begins + lengths <= self._firsts[shards + 1]

    @functools.lru_cache(MAPS)  # noqa: B019
    def _map(self, shard: int) -> "Mapped":
        """Kept for this object, so that a dataset that is opened again is read again."""
        ids, edges = self.split.shards[shard].ids(), Edges(self.split.shards[shard])
        return Mapped(ids, edges, np.lib.stride_tricks.sliding_window_view(ids, min(self._window, len(ids))))


class Mapped(NamedTuple):
    """The files of a shard: its ids, its document boundaries, and a view of the windows of ids that begin at each id."""

    ids: np.ndarray
    edges: Edges
    windows: np.ndarray


def _segments(lines: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions of consecutive pieces. Piece i takes `places[i]` places in row `lines[i]`."""
    firsts = np.flatnonzero(np.diff(lines, prepend=-1))  # the first piece of each line
    numbers = np.arange(1, len(lines) + 1) - np.repeat(firsts, np.diff(firsts, append=len(lines)))
    ends = np.cumsum(places)
    positions = np.arange(places.sum(), dtype=np.int32) - np.repeat((ends - places).astype(np.int32), places)
    return np.repeat(numbers.astype(np.int32), places), positions


def _count(split: Split, seq_len: int) -> int:
    """The number of rows. Raises `DataError` when there is none."""
    if count := max(0, split.tokens - 1) // seq_len:
        return count
    shorter = f", train.seq_len={split.tokens - 1} or less" if split.tokens > 1 else ""
    raise DataError(
        f"{split.name} has {split.tokens} tokens, a row needs {seq_len + 1}",
        where=split.source(0) if split.documents else "train.seq_len",
        next=f"data.rows=packed, which pads rows{shorter}, or more text",
    )
