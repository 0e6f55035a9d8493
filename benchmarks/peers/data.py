"""Batches of random rows by other means, from one mapped file of ids: endless iterators over arrays [batch, seq + 1]."""

from collections.abc import Iterator
from typing import Any

import numpy as np


def bare_memmap(ids: np.ndarray, batch: int, seq: int) -> Iterator[np.ndarray]:
    """One gather of whole rows into an array that is made once, in the dtype of the file: the least possible work."""
    rows = ids[: len(ids) // (seq + 1) * (seq + 1)].reshape(-1, seq + 1)
    out, rng = np.empty((batch, seq + 1), ids.dtype), np.random.default_rng(0)
    while True:
        yield np.take(rows, rng.integers(0, len(rows), batch), axis=0, out=out)


def nanogpt(ids: np.ndarray, batch: int, seq: int) -> Iterator[Any]:
    """nanoGPT's get_batch: a slice of each row, converted to int64 and stacked, for inputs and for targets."""
    import torch

    while True:
        starts = torch.randint(len(ids) - seq - 1, (batch,)).tolist()
        inputs, targets = (
            torch.stack([torch.from_numpy(ids[i + shift : i + shift + seq].astype(np.int64)) for i in starts]) for shift in (0, 1)
        )
        yield inputs, targets


class Windows:
    """A dataset as torch and grain take it: row by row."""

    def __init__(self, ids: np.ndarray, seq: int):
        self.ids, self.seq = ids, seq

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.seq

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[index * self.seq : (index + 1) * self.seq + 1].astype(np.int32)


def torch_loader(ids: np.ndarray, batch: int, seq: int) -> Iterator[Any]:
    """torch's DataLoader in this process, without workers."""
    import torch

    dataset: Any = Windows(ids, seq)
    loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, drop_last=True, collate_fn=np.stack)
    while True:
        yield from loader


def grain_rows(ids: np.ndarray, batch: int, seq: int) -> Iterator[Any]:
    """grain as its tutorials use it, with one element per row."""
    import grain

    rows: Any = grain.MapDataset.source(Windows(ids, seq)).seed(0).shuffle().repeat()
    iterator = iter(rows.batch(batch, drop_remainder=True).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
    try:
        yield from iterator
    finally:
        iterator.close()


PEERS = {"bare memmap": bare_memmap, "nanoGPT": nanogpt, "torch DataLoader": torch_loader, "grain, by row": grain_rows}
