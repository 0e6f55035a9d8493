"""From documents one after another to rows of equal length: three ways, each a function of the row's number."""

import abc
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from llama_eqx.batch import Batch
from llama_eqx.data.packing import PackIndex
from llama_eqx.data.shards import Split
from llama_eqx.errors import DataError


class Piece(NamedTuple):
    """The tokens `begin` up to `end` of a split that a row has one after another, as inputs, as targets, or both."""

    split: Split
    begin: int
    end: int


class Rows(abc.ABC):
    """Rows of `seq_len` tokens, numbered from 0, with a target for each token.

    `segmented` rows have segment ids, and positions that begin at 0 in each segment. `targets` are those of all rows that the loss is to
    count, `bytes` those of text in UTF-8 that they stand for.
    """

    seq_len: int
    segmented: bool
    targets: int
    bytes: float

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        """Those rows; where a number is -1, a row of padding.

        Raises `DataError` naming shard and offset for an id that is not in the vocabulary.
        """

    @abc.abstractmethod
    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        """How many targets of those rows the loss is to count. No token is read for it."""

    @abc.abstractmethod
    def pieces(self, row: int) -> list[Piece]:
        """What a row consists of, in its order."""

    def source(self, row: int) -> int:
        """The number of the source that a row is of, where several are joined."""
        return 0

    def first(self) -> list[int]:
        """The first token of the first row."""
        return self.read(np.zeros(1, np.int64)).tokens[0, :1].tolist()


class Windows(Rows):
    """The stream of all documents in rows of `seq_len` + 1 tokens: the last of a row is the first of the next, so that every token but
    the first is a target. Attention sees through the edges of documents. What does not fill a row at the end is left out.

    Raises `DataError` when there is not one row.
    """

    segmented = False

    def __init__(self, split: Split, seq_len: int):
        self.split, self.seq_len = split, seq_len
        self.targets = _check(self) * seq_len
        self.bytes = self.targets * split.bytes / split.tokens

    def __len__(self) -> int:
        return _windows(self.split, self.seq_len)

    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        ids = _ids(self.split, self.seq_len, rows)
        mask = np.broadcast_to((rows >= 0)[:, None], (len(rows), self.seq_len)).astype(np.float32)
        return Batch(ids[:, :-1], ids[:, 1:], mask)

    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        return int((rows >= 0).sum()) * self.seq_len

    def pieces(self, row: int) -> list[Piece]:
        return [Piece(self.split, row * self.seq_len, (row + 1) * self.seq_len + 1)]


class Documents(Rows):
    """The rows of `Windows`, with a segment for each document in them, and no target in another document.

    Raises `DataError` when there is not one row.
    """

    segmented = True

    def __init__(self, split: Split, seq_len: int):
        self.split, self.seq_len = split, seq_len
        end = _check(self) * seq_len
        self.targets = end - int(_documents_before(split, np.array([end + 1]))[0]) + 1  # all tokens but those that begin a document
        self.bytes = self.targets * split.bytes / max(split.tokens - split.documents, 1)

    def __len__(self) -> int:
        return _windows(self.split, self.seq_len)

    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        ids = _ids(self.split, self.seq_len, rows)
        begins = np.zeros(ids.shape, bool)
        for line, row in zip(begins, rows.tolist(), strict=True):
            if row >= 0:
                first = row * self.seq_len
                line[self.split.starts(first, first + self.seq_len + 1) - first] = True
        real = rows[:, None] >= 0
        ends, begins = begins[:, 1:], begins[:, :-1]
        begins[:, :1] = real
        columns = np.arange(self.seq_len, dtype=np.int32)
        segments = np.cumsum(begins, 1, dtype=np.int32)
        positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), 1)
        return Batch(ids[:, :-1], np.where(ends, 0, ids[:, 1:]), (real & ~ends).astype(np.float32), segments, np.where(real, positions, 0))

    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        first = rows[rows >= 0] * self.seq_len + 1
        begun = _documents_before(self.split, first + self.seq_len) - _documents_before(self.split, first)
        return len(first) * self.seq_len - int(begun.sum())

    def pieces(self, row: int) -> list[Piece]:
        begin, end = row * self.seq_len, (row + 1) * self.seq_len + 1
        edges = [begin, *self.split.starts(begin + 1, end).tolist(), end]
        return [Piece(self.split, a, b) for a, b in itertools.pairwise(edges) if a < end - 1]


class Packed(Rows):
    """Whole documents, or pieces of those that are longer than a row, as an index says; each is a segment. The rest of a row is padding.

    `learned` says which tokens the loss counts as targets, as in `pack_index`; None counts all.
    """

    segmented = True

    def __init__(self, split: Split, learned: Split | None, index: PackIndex, seq_len: int):
        self.split, self.learned, self.index, self.seq_len = split, learned, index, seq_len
        self.targets, self.bytes = int(index.counted.sum(dtype=np.int64)), split.bytes

    def __len__(self) -> int:
        return len(self.index.counted)

    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        shape = len(rows), self.seq_len
        tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
        mask = np.zeros(shape, np.float32)
        columns = np.arange(self.seq_len, dtype=np.int32)
        for line, row in enumerate(rows.tolist()):
            at = 0
            for segment, (split, begin, end) in enumerate(self.pieces(row) if row >= 0 else (), 1):
                ids = split.read(begin, end)
                here = slice(at, at + len(ids) - 1)
                tokens[line, here], targets[line, here] = ids[:-1], ids[1:]
                mask[line, here] = 1 if self.learned is None else self.learned.read(begin + 1, end)
                segments[line, here], positions[line, here] = segment, columns[: len(ids) - 1]
                at = here.stop
        return Batch(tokens, targets, mask, segments, positions)

    def counted(self, rows: Int[np.ndarray, " batch"]) -> int:
        return int(self.index.counted[rows[rows >= 0]].sum(dtype=np.int64))

    def pieces(self, row: int) -> list[Piece]:
        here = slice(*self.index.firsts[row : row + 2].tolist())
        begins, lengths = self.index.begins[here].tolist(), self.index.lengths[here].tolist()
        return [Piece(self.split, begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]


class Joined(Rows):
    """The rows of several sources, one source after another. When some are segmented, the others' rows are one segment each."""

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
        """The sources that have some of `rows`: which of `rows` they are, and their numbers in the source."""
        of = np.searchsorted(self._firsts, rows, side="right") - 1
        places = [np.flatnonzero(of == i) for i in range(len(self.sources))]
        return [(self.sources[i], at, rows[at] - self._firsts[i]) for i, at in enumerate(places) if len(at)]


def _windows(split: Split, seq_len: int) -> int:
    return max(0, split.tokens - 1) // seq_len


def _check(rows: Windows | Documents) -> int:
    """The number of rows."""
    split, seq_len = rows.split, rows.seq_len
    if count := len(rows):
        return count
    shorter = f"train.seq_len={split.tokens - 1} or less, " if split.tokens > 1 else ""
    raise DataError(
        f"{split.name} has {split.tokens} tokens, a row needs {seq_len + 1}",
        where="train.seq_len",
        next=f"{shorter}more text, or another data.validation_fraction",
    )


def _ids(split: Split, seq_len: int, rows: np.ndarray) -> Int[np.ndarray, "batch window"]:
    ids = np.zeros((len(rows), seq_len + 1), np.int32)
    for line, row in zip(ids, rows.tolist(), strict=True):
        if row >= 0:
            line[:] = split.read(row * seq_len, (row + 1) * seq_len + 1)
    return ids


def _documents_before(split: Split, tokens: np.ndarray) -> np.ndarray:
    """[count] int64: how many documents begin before each token."""
    firsts = np.cumsum([0, *(shard.tokens for shard in split.shards)])
    numbers = np.cumsum([0, *(shard.documents for shard in split.shards)])
    found = np.empty(len(tokens), np.int64)
    of = np.searchsorted(firsts[1:-1], tokens, side="right")
    for i in np.unique(of):
        found[of == i] = numbers[i] + np.searchsorted(split.shards[i].offsets()[:-1], tokens[of == i] - firsts[i])
    return found
