"""Cuts text for evaluation: every token is predicted once, including the last ones of a text."""

import dataclasses

import numpy as np
from jaxtyping import Int

from llama_eqx.batch import Batch
from llama_eqx.data.packing import PackIndex, document_bounds, learned_sums, pack
from llama_eqx.data.rows import Packed
from llama_eqx.data.shards import Split
from llama_eqx.errors import DataError


class Sliding(Packed):
    """Windows of up to `seq_len` tokens. One begins every `stride` tokens of a text and predicts what the window before it did not: the
    first window all its targets, the others all but their first `seq_len - stride`. With a stride of `seq_len` windows are disjoint.

    A text is a document, or the whole split with `whole`. Its first token is not predicted. Short windows share a row, each as a segment.

    Raises `DataError` when there is nothing to predict.
    """

    def __init__(self, split: Split, learned: Split | None, seq_len: int, stride: int, *, whole: bool):
        begins, lengths = (np.array([0]), np.array([split.tokens])) if whole else document_bounds(split)
        targets = lengths - 1
        counts = np.where(targets > 0, 1 + np.maximum(-(-(targets - seq_len) // stride), 0), 0)
        if not counts.any():
            raise DataError(f"{split.name} has no text of two tokens or more", where=str(split.shards[0].path.parent), next="more text")
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # the number of a window in its text
        self.firsts = begins[counts > 0]  # the tokens that begin a text
        begins, sizes = np.repeat(begins, counts) + number * stride, np.minimum(seq_len, np.repeat(targets, counts) - number * stride)
        skips = np.where(number > 0, seq_len - stride, 0)
        counted = sizes - skips if learned is None else learned_sums(learned, begins + 1 + skips, begins + 1 + sizes)
        rows = pack(sizes, seq_len)
        order, firsts = np.argsort(rows, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(rows))])
        self._skips = skips[order]
        index = PackIndex(firsts, begins[order], sizes[order] + 1, np.add.reduceat(counted[order], firsts[:-1]))
        super().__init__(split, learned, index, seq_len)
        self.split = split

    def read(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        batch = super().read(rows)
        windows, _ = self.places(rows)
        return dataclasses.replace(batch, loss_mask=batch.loss_mask * (batch.positions >= self._skips[windows]))

    @property
    def windows(self) -> int:
        return len(self._skips)

    def places(self, rows: Int[np.ndarray, " batch"]) -> tuple[Int[np.ndarray, "batch seq"], Int[np.ndarray, "batch seq"]]:
        """For every target of those rows, the numbers of its window and its document; -1 where there is no target."""
        windows, tokens = (np.full((len(rows), self.seq_len), -1) for _ in range(2))
        for line, row in enumerate(rows.tolist()):
            at = 0
            for piece in range(*self.index.firsts[[row, row + 1]].tolist()) if row >= 0 else ():
                begin, size = int(self.index.begins[piece]), int(self.index.lengths[piece]) - 1
                windows[line, at : at + size], tokens[line, at : at + size] = piece, np.arange(begin + 1, begin + 1 + size)
                at += size
        documents = np.full(tokens.shape, -1)
        documents[tokens >= 0] = self._tokens.documents_before(tokens[tokens >= 0] + 1) - 1
        return windows, documents
