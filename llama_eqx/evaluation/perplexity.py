"""How well a model predicts text, with a confidence interval, by position and by document."""

import math
from typing import Literal, NamedTuple

import jax
import numpy as np
from scipy.special import stdtrit
from tqdm import tqdm

from llama_eqx.data.dataset import sliding
from llama_eqx.data.pipeline import validation_batches
from llama_eqx.data.rows import Shifted
from llama_eqx.data.sliding import Sliding
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import ConfigError, NonFiniteError
from llama_eqx.evaluation.opened import EvaluateConfig, Opened, data_of, open_model, step_of
from llama_eqx.processes import is_first, watched
from llama_eqx.training.evaluation import BUCKETS, Sums, bucket, fetched

FEW = 10  # documents; fewer say too little about how documents differ


class Document(NamedTuple):
    """`loss` is the mean over its `tokens` that were predicted, in nats per token."""

    name: str
    loss: float
    tokens: int


class Result(NamedTuple):
    """`loss` is in nats per token over `tokens`, with a 95% confidence interval from `low` to `high`. `bytes` is the size of the text in
    UTF-8.

    `by_position` has, for each p, the loss and the number of the tokens predicted from positions p to 2p - 1.
    """

    loss: float
    low: float
    high: float
    clusters: Literal["documents", "windows"]
    accuracy: float
    bits_per_byte: float
    tokens: int
    bytes: int
    windows: int
    by_position: dict[int, tuple[float, int]]
    documents: list[Document]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


class Evaluated(NamedTuple):
    """The results by the name of the data's source, "" if the data is no mixture. `step` is that of a run, and how many it is to have.
    `notes` are what the user should know.
    """

    parameters: int
    step: tuple[int, int | None] | None
    length: int
    stride: int
    results: dict[str, Result]
    notes: list[str]


def evaluate(config: EvaluateConfig) -> Evaluated:
    """Predicts every token of each text but the first, once. Sums are in float64.

    Raises `ConfigError`, `CheckpointError` and `DataError` before anything is compiled, `NonFiniteError` for a loss that is not finite.
    """
    data, opened, step = data_of(config), open_model(config), step_of(config)  # without a checkpoint, opening says so
    length, stride = opened.length, config.stride or opened.length
    if stride > length:
        raise ConfigError(f"a stride of {stride} skips tokens between windows of {length}", where="stride", next=f"stride={length}")
    results = {}
    for name, (_, source) in data.sources().items():
        rows = sliding(source, opened.tokenizer, seq_len=length, stride=stride)
        results[name] = measure(opened, rows, name or "evaluating", position_offset=data.position_offset, stall=config.distributed.stall)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(opened.model))
    return Evaluated(parameters, step, length, stride, results, opened.notes)


def measure(opened: Opened, rows: Sliding, name: str, *, position_offset: int = 0, stall: int | None = None) -> Result:
    """Evaluates the model on all of `rows`, with a progress bar called `name`. `position_offset` is added to their positions.

    With several processes, each reads its own rows and returns the whole result.
    """
    split, batch_size = rows.split, opened.batch_size
    positions, documents, windows = Sums(BUCKETS), Sums(split.documents), Sums(rows.windows)
    sharding = opened.layout.sharding(("batch", "seq"), (batch_size, rows.seq_len))
    batches = validation_batches(Shifted(rows, position_offset), sharding, batch_size=batch_size)
    hidden = None if is_first() else True  # None: only where there is no terminal
    each = fetched(opened.score(opened.model, batch) for batch in batches)
    with tqdm(each, total=-(-len(rows) // batch_size), desc=name, unit=" batches", disable=hidden) as progress:
        for number, scores in enumerate(watched(progress, stall)):
            numbers = np.arange(number * batch_size, (number + 1) * batch_size)
            of_windows, of_documents = rows.places(np.where(numbers < len(rows), numbers, -1))
            positions.add(bucket(scores.positions), scores)
            documents.add(of_documents, scores)
            windows.add(of_windows, scores)
            progress.set_postfix_str(f"loss {positions.loss():.4f}")
    seen = np.flatnonzero(documents.weights)
    if not math.isfinite(loss := positions.loss()):
        worst = next(number for number in seen.tolist() if not math.isfinite(documents.nats[number]))
        raise NonFiniteError(f"the loss is {loss}", where=split.source(worst), next="python -m llama_eqx.doctor path=CHECKPOINT")
    clusters = documents if len(seen) >= FEW else windows
    half = half_width(clusters.nats, clusters.weights)
    tokens = round(math.fsum(positions.weights))
    n_bytes = split.bytes - _unseen(rows, opened.tokenizer)
    return Result(
        loss=loss,
        low=loss - half,
        high=loss + half,
        clusters="documents" if clusters is documents else "windows",
        accuracy=positions.accuracy(),
        bits_per_byte=math.fsum(positions.nats) / math.log(2) / max(n_bytes, 1),
        tokens=tokens,
        bytes=n_bytes,
        windows=rows.windows,
        by_position={
            (1 << b) >> 1: (float(positions.losses[b]), round(positions.weights[b])) for b in np.flatnonzero(positions.weights).tolist()
        },
        documents=[Document(split.source(i), float(documents.losses[i]), round(documents.weights[i])) for i in seen.tolist()],
    )


def half_width(nats: np.ndarray, weights: np.ndarray, confidence: float = 0.95) -> float:
    """Half the width of a confidence interval of the mean `sum(nats) / sum(weights)` over clusters whose members are alike.

    The mean is that of a regression on a constant. Its variance (CR2) and the degrees of freedom of Student's t are those of Bell and
    McCaffrey (2002, Survey Methodology 28): the more the clusters differ in size, the wider is the interval. NaN for a single cluster.
    """
    nats, weights = nats[weights > 0], weights[weights > 0]
    if len(nats) < 2:
        return math.nan
    total = math.fsum(weights)
    shares = weights / total
    residuals = nats - nats.sum() * shares
    error = math.sqrt(math.fsum(residuals**2 / (1 - shares))) / total
    odds = shares**2 / (1 - shares)
    freedom = 1 / (math.fsum(shares**2) + math.fsum(odds) ** 2 - math.fsum(odds**2))
    return float(stdtrit(freedom, (1 + confidence) / 2)) * error


def _unseen(rows: Sliding, tokenizer: Tokenizer) -> int:
    """The bytes of the tokens that begin a text, which are not predicted: none if that is BOS."""
    first = np.array([int(rows.split.read(token, token + 1)[0]) for token in rows.firsts.tolist()])
    ids, counts = np.unique(first, return_counts=True)
    return sum(len(tokenizer.decode([i]).encode()) * count for i, count in zip(ids.tolist(), counts.tolist(), strict=True))
