"""Makes sharded batches from rows. A batch is a function of (seed, index of the batch) alone, however many processes share it."""

import contextlib
import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Int

from llama_eqx.batch import Batch
from llama_eqx.data.order import chained, digest
from llama_eqx.data.rows import Rows
from llama_eqx.errors import ConfigError

T = TypeVar("T")

AT_ONCE = {False: 2**21, True: 2**17}  # tokens in rows without and with segments, which are slow to allocate
ORDERED = 2**14  # samples


class Progress(NamedTuple):
    """What has been drawn in `step` batches. `tokens` is the number of targets that the loss counted.

    `ledger` is a hash of the data and of the rows of each batch, in order. Two runs with the same ledger saw the same batches.
    """

    step: int
    ledger: int
    tokens: int


class Part(NamedTuple):
    """One process's part of a batch, in numpy. `digest` and the number of `counted` targets are those of the whole batch."""

    batch: Batch
    digest: bytes
    counted: int


class Parts:
    """This process's part of every batch, by the batch's index."""

    def __init__(
        self,
        rows: Rows,
        order: Callable[[np.ndarray], np.ndarray],
        batch_size: int,
        shard: int = 0,
        n_shards: int = 1,
        fingerprint: str = "",
    ):
        """`fingerprint` is that of the rows. Raises `ConfigError` when the shards do not divide the batch."""
        share, rest = divmod(batch_size, n_shards)
        if rest or not share:
            raise ConfigError(f"batch_size={batch_size} does not divide into {n_shards} parts", where="train.batch_size")
        self._rows, self._order, self._batch_size = rows, order, batch_size
        self._share, self._mine = share, slice(shard * share, (shard + 1) * share)
        # The order of many samples is computed at once, and kept for the batches that come next.
        self._block = max(1, min(64, ORDERED // batch_size))
        self._ordered = functools.lru_cache(maxsize=4)(self._ordered_block)
        self._start = Progress(0, chained(0, fingerprint.encode()), 0)

    def __len__(self) -> int:
        return 2**62 // self._batch_size

    def __getitem__(self, index: int) -> Part:
        return self.several(index, 1)[0]

    def several(self, first: int, count: int) -> list[Part]:
        """Consecutive batches, read at once."""
        rows = [self.numbers(index) for index in range(first, first + count)]
        leaves, structure = jax.tree.flatten(self._rows.read(np.concatenate([whole[self._mine] for whole in rows])))
        cuts = [slice(i * self._share, (i + 1) * self._share) for i in range(count)]
        batches = [structure.unflatten([leaf[cut] for leaf in leaves]) for cut in cuts]
        return [Part(batch, digest(whole), self._rows.counted(whole)) for batch, whole in zip(batches, rows, strict=True)]

    def numbers(self, index: int) -> Int[np.ndarray, " batch"]:
        """The row numbers of a whole batch."""
        block, within = divmod(index, self._block)
        return self._ordered(block)[within]

    def _ordered_block(self, block: int) -> Int[np.ndarray, "block batch"]:
        size = self._block * self._batch_size
        return self._order(np.arange(block * size, (block + 1) * size)).reshape(self._block, -1)

    @property
    def together(self) -> int:
        """How many batches are best read at once."""
        return max(1, min(64, AT_ONCE[self._rows.segmented] // (self._share * self._rows.seq_len)))

    def after(self, step: int, known: Progress | None = None) -> Progress:
        """The progress after `step` batches, continued from `known`. No token is read for it."""
        known = known or self._start
        for index in range(known.step, step):
            rows = self.numbers(index)
            known = Progress(index + 1, chained(known.ledger, digest(rows)), known.tokens + self._rows.counted(rows))
        return known


@contextlib.contextmanager
def read(parts: Parts, start: int = 0) -> Iterator[Iterator[Part]]:
    """Yields an endless iterator over `parts` from number `start` on, which reads ahead.

    It is closed on exit: left open, its threads can abort the interpreter.
    """
    import grain

    # An element of grain's costs about the same whatever is in it, so each holds several batches.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)  # more threads are slower: they contend for the GIL
    size = parts.together
    runs = grain.MapDataset.range(len(parts) // size).map(lambda run: parts.several(run * size, size))
    iterator: Any = iter(runs.to_iter_dataset(options))
    run, within = divmod(start, size)
    iterator.set_state({"next_index": run})

    def drawn() -> Iterator[Part]:
        yield parts[start]  # a run of batches would take longer
        yield from itertools.islice(itertools.chain.from_iterable(iterator), within + 1, None)

    try:
        yield drawn()
    finally:
        iterator.close()


@contextlib.contextmanager
def training_batches(parts: Parts, sharding: Sharding, batch_size: int, past: Progress) -> Iterator["Ahead[tuple[Batch, Progress]]"]:
    """Yields the batches from number `past.step` on, placed on the devices ahead of time, each with the progress it makes."""

    def placed(drawn: Iterator[Part]) -> Iterator[tuple[Batch, Progress]]:
        step, ledger, tokens = past
        for part in drawn:
            step, ledger, tokens = step + 1, chained(ledger, part.digest), tokens + part.counted
            yield place(part.batch, sharding, batch_size), Progress(step, ledger, tokens)

    with read(parts, past.step) as drawn, Ahead(placed(drawn)) as batches:
        yield batches


def validation_batches(rows: Rows, sharding: Sharding, *, batch_size: int) -> Iterator[Batch]:
    """Yields every row once, in order. The last batch is padded, so that all have one shape."""
    shard, n_shards = process_rows(sharding, batch_size, rows.seq_len)
    parts = Parts(rows, lambda samples: np.where(samples < len(rows), samples, -1), batch_size, shard, n_shards)
    count = -(-len(rows) // batch_size)
    with Ahead(place(parts[index].batch, sharding, batch_size) for index in range(count)) as batches:
        yield from batches


class Ahead(Iterator[T]):
    """Iterates over `items`, which a thread makes while up to `room` of them wait to be taken. It is used in a `with` statement. An
    exception in `items` is raised where they are taken.

    `waited` is the time in seconds that the consumer waited for items that were not made yet, with nothing else to do. `settle`, which
    waits for the device where steps are computed, is called first and does not count.
    """

    def __init__(self, items: Iterator[T], room: int = 2):
        self.waited = 0.0
        self.settle: Callable[[], None] = lambda: None
        self._items, self._free, self._closed = items, threading.Semaphore(room), threading.Event()
        self._made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._make, name="batches", daemon=True)

    def _make(self) -> None:
        try:
            while self._free.acquire() and not self._closed.is_set():
                self._made.put((next(self._items), None))
        except BaseException as error:  # including the end of the items
            self._made.put((None, error))

    def __next__(self) -> T:
        try:
            item, error = self._made.get_nowait()
        except queue.Empty:
            self.settle()
            begun = time.perf_counter()
            item, error = self._made.get()
            self.waited += time.perf_counter() - begun
        if error is not None:
            self._made.put((None, error))  # raised again if asked again
            raise error
        self._free.release()
        return item  # pyright: ignore[reportReturnType]

    def __enter__(self) -> "Ahead[T]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._free.release()
        self._thread.join()


def process_rows(sharding: Sharding, batch_size: int, seq_len: int) -> tuple[int, int]:
    """Returns which part of a batch's rows this process holds, as (shard, n_shards) of `Parts`.

    It follows from the sharding, not from the process's number: processes that split other axes hold the same rows.

    Raises `ConfigError` when the rows are not one of several equal parts.
    """
    slices = sharding.addressable_devices_indices_map((batch_size, seq_len)).values()
    parts = sorted({index[0].indices(batch_size)[:2] for index in slices if index})
    first, last = parts[0][0], parts[-1][1]
    held = last - first
    touching = all(end == begin for (_, end), (begin, _) in itertools.pairwise(parts))
    if not touching or batch_size % held or first % held:
        raise ConfigError(f"a process holds the rows {parts} of {batch_size}, which are not one contiguous, equal part", where="mesh")
    return first // held, batch_size // held


def place(part: Batch, sharding: Sharding, batch_size: int) -> Batch:
    """Returns a batch of `batch_size` rows over all processes, given this process's part."""

    def placed(leaf: np.ndarray) -> jax.Array:
        dtype = np.float32 if leaf.dtype.kind == "f" else np.int32
        return jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(leaf, dtype), (batch_size, leaf.shape[1]))

    return jax.tree.map(placed, part)
