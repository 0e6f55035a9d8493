"""From token ids to sharded batches. A batch is a function of (seed, index of the batch) alone, however many processes share it."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Bool, Int

from llama_eqx.batch import Batch
from llama_eqx.data.shards import Split
from llama_eqx.errors import ConfigError, DataError


class TokenWindows:
    """The ids of a split in rows of `seq_len` + 1: the last of a row is the first of the next, so that every id but the first is a target.

    What does not fill a row at the end is left out.

    Raises `DataError` when there is not one row.
    """

    def __init__(self, split: Split, seq_len: int):
        self.split, self.seq_len = split, seq_len
        if not len(self):
            shorter = f"train.seq_len={split.tokens - 1} or less, " if split.tokens > 1 else ""
            raise DataError(
                f"{split.name} has {split.tokens} tokens, a row needs {seq_len + 1}",
                where="train.seq_len",
                next=f"{shorter}more text, or another data.validation_fraction",
            )

    def __len__(self) -> int:
        return max(0, self.split.tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.seq_len
        return self.split.read(start, start + self.seq_len + 1).astype(np.int32)


@contextlib.contextmanager
def rows(
    source: TokenWindows, *, batch_size: int, seed: int, shard: int = 0, n_shards: int = 1, start: int = 0
) -> Iterator[Iterator[np.ndarray]]:
    """An endless iterator over arrays [batch_size / n_shards, seq_len + 1], from batch `start` on.

    Rows are drawn in a new order every epoch. The arrays of all shards one below another are the batch, the same for every
    `n_shards`. Closed on exit: left open, its threads can abort the interpreter.

    Raises `ConfigError` when the shards do not divide the batch.
    """
    import grain

    size = _share(batch_size, n_shards)
    # Epoch e is shuffled by seed + e: spread seeds keep the epochs of neighbouring seeds apart.
    spread = int(np.random.SeedSequence([seed, 0x5EED]).generate_state(1)[0])
    dataset = grain.MapDataset.source(source).shuffle(seed=spread).repeat().batch(size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # more threads are slower
    iterator: Any = iter(dataset[shard::n_shards].to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    try:
        yield iterator
    finally:
        iterator.close()


def validation_rows(source: TokenWindows, batch_size: int, *, shard: int = 0, n_shards: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every row of `source` once and in order, `n_batches` times: arrays as those of `rows`, and which of their rows are real.

    The last batch is filled up with rows of zeros, so that all have one shape.
    """
    size = _share(batch_size, n_shards)
    for batch in range(n_batches(source, batch_size)):
        begin = batch * batch_size + shard * size
        real = np.arange(begin, begin + size) < len(source)
        yield np.stack([source[begin + i] if real[i] else np.zeros(source.seq_len + 1, np.int32) for i in range(size)]), real


def n_batches(source: TokenWindows, batch_size: int) -> int:
    """How many batches `validation_rows` gives."""
    return -(-len(source) // batch_size)


def process_rows(sharding: Sharding, batch_size: int, seq_len: int) -> tuple[int, int]:
    """Which part of a batch's rows this process holds, as (shard, n_shards) of `rows`.

    It follows from the sharding, not from the number of the process: processes that split other axes hold the same rows.

    Raises `ConfigError` when the rows are not one of several equal parts.
    """
    slices = sharding.addressable_devices_indices_map((batch_size, seq_len)).values()
    parts = sorted({index[0].indices(batch_size)[:2] for index in slices if index})
    first, last = parts[0][0], parts[-1][1]
    held = last - first
    touching = all(end == begin for (_, end), (begin, _) in itertools.pairwise(parts))
    if not touching or batch_size % held or first % held:
        raise ConfigError(f"a process holds the rows {parts} of {batch_size}, not one run of them", where="mesh")
    return first // held, batch_size // held


def place(
    rows: Int[np.ndarray, "rows window"], sharding: Sharding, batch_size: int, real: Bool[np.ndarray, " rows"] | None = None
) -> Batch:
    """A batch of `batch_size` rows over all processes, from those of this process; targets of rows that are not `real` do not count."""
    mask = np.ones(len(rows), bool) if real is None else real
    tokens, targets = rows[:, :-1], rows[:, 1:]
    shape = (batch_size, tokens.shape[1])
    leaves = tokens, targets, np.broadcast_to(mask[:, None], tokens.shape).astype(np.float32)
    return Batch(*(jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(leaf), shape) for leaf in leaves))


@contextlib.contextmanager
def training_batches(source: TokenWindows, sharding: Sharding, *, batch_size: int, seed: int, start: int = 0) -> Iterator[Iterator[Batch]]:
    """The batches of `rows`, sharded; batch `start` comes first."""
    shard, n_shards = process_rows(sharding, batch_size, source.seq_len)
    with rows(source, batch_size=batch_size, seed=seed, shard=shard, n_shards=n_shards, start=start) as arrays:
        yield (place(array, sharding, batch_size) for array in arrays)


def validation_batches(source: TokenWindows, sharding: Sharding, *, batch_size: int) -> Iterator[Batch]:
    """The batches of `validation_rows`, sharded."""
    shard, n_shards = process_rows(sharding, batch_size, source.seq_len)
    for array, real in validation_rows(source, batch_size, shard=shard, n_shards=n_shards):
        yield place(array, sharding, batch_size, real)


def _share(batch_size: int, n_shards: int) -> int:
    size, rest = divmod(batch_size, n_shards)
    if rest or not size:
        raise ConfigError(f"batch_size={batch_size} does not divide into {n_shards} parts", where="train.batch_size")
    return size
