"""How well a model predicts held-out text: scored by target on the devices, summed in float64 on the host."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int

from llama_eqx.batch import Batch
from llama_eqx.data.rows import Rows
from llama_eqx.errors import DataError
from llama_eqx.model.llama import Llama
from llama_eqx.sharding import Layout
from llama_eqx.training.cross_entropy import head_scores

BUCKETS = 33  # of positions: 0, 1, 2-3, 4-7, … up to those of an int32


class Scores(NamedTuple):
    """Scores of every target of a batch: its cross-entropy in nats, whether it is the most probable token, its weight (0 leaves it out),
    and the position that predicts it, counted from 0 within its segment.
    """

    nats: Float32[Array, "batch seq"]
    correct: Bool[Array, "batch seq"]
    weights: Float[Array, "batch seq"]
    positions: Int[Array, "batch seq"]


Score = Callable[[Llama, Batch], Scores]


def make_score(view: Callable[[Llama], Llama], layout: Layout, chunk: int | None) -> Score:
    """Returns a function to be jitted. Its scores are whole on every device, so each process can sum them. `chunk` as in `Objective`."""

    def score(model: Llama, batch: Batch) -> Scores:
        model = view(model)
        x, _ = model.hidden(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        nats, correct = head_scores(x, model.unembed, batch.targets, chunk=chunk, layout=layout, as_logits=model.logits)
        scores = Scores(nats, correct, batch.loss_mask, _within_segments(batch))
        return jax.lax.with_sharding_constraint(scores, layout.sharding(("", ""), batch.tokens.shape))

    return score


def _within_segments(batch: Batch) -> Int[Array, "batch seq"]:
    """The index of every token within its segment, whatever `batch.positions` says."""
    places = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    if batch.segment_ids is None:
        return places
    begins = jnp.diff(batch.segment_ids, axis=1, prepend=-1) != 0
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def fetched(scores: Iterable[Scores]) -> Iterator[Any]:
    """The scores as NumPy arrays, each read once the next batch is on its way, so that the devices need not wait for the host."""
    for ready, _ in itertools.pairwise(itertools.chain(scores, (None,))):
        yield jax.device_get(ready)


class Sums:
    """Sums of nats, of weights, and of the weights of correct predictions, for each number below `count`.

    They are in float64, so they hardly depend on how the targets are batched.
    """

    def __init__(self, count: int):
        self.nats, self.weights, self.correct = (np.zeros(count) for _ in range(3))

    def add(self, numbers: Int[np.ndarray, "batch seq"], scores: Scores) -> None:
        counted = scores.weights > 0
        numbers, weights = numbers[counted], scores.weights[counted].astype(np.float64)
        self.nats += np.bincount(numbers, weights * scores.nats[counted], len(self.nats))
        self.weights += np.bincount(numbers, weights, len(self.weights))
        self.correct += np.bincount(numbers, weights * scores.correct[counted], len(self.correct))

    @property
    def losses(self) -> Float64[np.ndarray, " count"]:
        """Nats per token, NaN where there is none."""
        return np.divide(self.nats, self.weights, out=np.full(len(self.nats), np.nan), where=self.weights > 0)

    def loss(self) -> float:
        """Nats per token over all numbers. Raises `DataError` when no target counts."""
        if not self.weights.any():
            raise DataError("no held-out target counts in the loss", where="data", next="other data, or longer rows: train.seq_len")
        return math.fsum(self.nats) / math.fsum(self.weights)

    def accuracy(self) -> float:
        return math.fsum(self.correct) / math.fsum(self.weights)


def bucket(positions: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """The bucket of a position, by powers of two: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7."""
    return np.frexp(positions)[1]


def by_position(sums: Sums) -> dict[int, float]:
    """Nats per token of every `bucket` that has targets, by its first position."""
    return {(1 << number) >> 1: float(sums.losses[number]) for number in np.flatnonzero(sums.weights).tolist()}


class Evaluation(NamedTuple):
    """`loss` is in nats per token; `bits_per_byte` compares models whatever their tokenizers; `accuracy` is the fraction of targets that
    are the most probable token; `tokens` were counted. `by_position[p]` is the loss of those predicted from positions p to 2p - 1, and
    `by_source[n]` that of the rows of source n.
    """

    loss: float
    bits_per_byte: float
    accuracy: float
    tokens: int
    by_position: dict[int, float]
    by_source: dict[int, float]

    def metrics(self, sources: Sequence[str]) -> dict[str, float]:
        """The metrics by their names in `metrics.jsonl`. `sources` are the names of the rows' sources; "" has no loss of its own."""
        by_position = {f"val/loss_at_{position}": loss for position, loss in self.by_position.items()}
        by_source = {f"val/{sources[n]}/loss": loss for n, loss in self.by_source.items() if sources[n]}
        whole = {"val/loss": self.loss, "val/bits_per_byte": self.bits_per_byte, "val/accuracy": self.accuracy}
        return whole | by_position | by_source


def make_evaluate(score: Score) -> Callable[[Llama, Iterable[Batch], Rows], Evaluation]:
    scored = eqx.filter_jit(score)

    def evaluate(model: Llama, batches: Iterable[Batch], rows: Rows) -> Evaluation:
        """Averages over every target that the masks count, in `batches` of all `rows`. The context of each is the tokens before it in its
        row.
        """
        last, numbers = len(rows) - 1, itertools.count()
        sums, of_sources = Sums(BUCKETS), Sums(rows.source(last) + 1)
        for scores in fetched(scored(model, batch) for batch in batches):
            sums.add(bucket(scores.positions), scores)
            sources = [rows.source(min(next(numbers), last)) for _ in scores.nats]  # what fills the last batch has no weight
            of_sources.add(np.broadcast_to(np.array(sources)[:, None], scores.nats.shape), scores)
        loss = sums.loss()
        return Evaluation(
            loss=loss,
            bits_per_byte=loss / math.log(2) / (rows.bytes / rows.targets),
            accuracy=sums.accuracy(),
            tokens=round(math.fsum(sums.weights)),
            by_position=by_position(sums),
            by_source={n: float(of_sources.losses[n]) for n in np.flatnonzero(of_sources.weights).tolist()},
        )

    return evaluate
