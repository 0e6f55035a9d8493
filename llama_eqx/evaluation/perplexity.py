"""How well a model predicts text, with a confidence interval, by position and by document."""

import math
import pathlib
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import numpy as np
from scipy.special import stdtrit
from tqdm import tqdm

from llama_eqx.checkpoint.native import CONFIG, read_config
from llama_eqx.config import Config, load
from llama_eqx.data.corpus import DataConfig
from llama_eqx.data.dataset import sliding
from llama_eqx.data.pipeline import validation_batches
from llama_eqx.data.rows import Shifted
from llama_eqx.data.shards import PreparedTokenizerConfig
from llama_eqx.data.sliding import Sliding
from llama_eqx.data.tokenizer import Tokenizer, TokenizerConfig, find_tokenizer
from llama_eqx.errors import ConfigError, DataError, NonFiniteError
from llama_eqx.interop.pretrained import load_pretrained, located, open_pretrained
from llama_eqx.interop.weights import abstract
from llama_eqx.model.kernel import KernelConfig
from llama_eqx.model.llama import Llama
from llama_eqx.precision import Dtype, PrecisionConfig
from llama_eqx.remat import RematConfig
from llama_eqx.sharding import Layout, MeshConfig, Rules
from llama_eqx.training.evaluation import BUCKETS, Score, Sums, bucket, make_score
from llama_eqx.training.loss import policy_view

FEW = 10  # documents, fewer than which say too little of how documents differ
CHUNK = 2048  # tokens whose logits exist at a time
LONGEST = 2048  # tokens of a window where neither a run nor the user says


class EvaluateConfig(Config):
    """The weights at `checkpoint` on the held-out text of `data`, None for that of the run.

    `length` is that of a window in tokens, None for that of training or of the context, and `stride` how many of them it is to predict,
    None for all. `batch_size` windows at a time go over all devices, in `dtype`, None for that of the files. `output` is a file of JSON.
    """

    checkpoint: str | None
    data: DataConfig | None
    tokenizer: TokenizerConfig | None
    mesh: MeshConfig
    sharding: Rules
    length: int | None
    stride: int | None
    batch_size: int
    dtype: Dtype | None
    output: str | None

    def check(self) -> None:
        if self.checkpoint is None:
            raise ConfigError("checkpoint is not given", where="checkpoint", next="checkpoint=RUN_DIR, or a folder of Hugging Face or Meta")
        for name in ("length", "stride", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{value} is too small", where=name)


class Document(NamedTuple):
    """The mean over its `tokens` that were predicted, in nats per token."""

    name: str
    loss: float
    tokens: int


class Result(NamedTuple):
    """`loss` in nats per token over `tokens`, with a confidence interval of 95% from `low` to `high`; `bytes` of text in UTF-8.

    `by_position` has loss and tokens of those predicted from position p, 2p - 1 and between.
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
    """The results by the names of the sources of the data, "" when there is but one. `notes` are what a person should know."""

    parameters: int
    length: int
    stride: int
    results: dict[str, Result]
    notes: list[str]


class Opened(NamedTuple):
    """A model on its devices, how it is laid out there, and its tokenizer."""

    model: Llama
    layout: Layout
    score: Score
    tokenizer: Tokenizer


def evaluate(config: EvaluateConfig) -> Evaluated:
    """Every token of the text is predicted once, but for the first of each; sums are in float64.

    Raises `ConfigError`, `CheckpointError` and `DataError` before anything is compiled, `NonFiniteError` for a loss that is no number.
    """
    assert config.checkpoint is not None
    data, length = _data_and_length(config, located(config.checkpoint)[0])
    stride = config.stride or length
    if stride > length:
        raise ConfigError(f"a stride of {stride} leaves out tokens between windows of {length}", where="stride", next=f"stride={length}")
    opened, notes = open_model(config, data, length)
    context = opened.model.config.context
    if length > context:
        notes.append(f"windows of {length} tokens are longer than the model's context of {context}")
    results = {}
    for name, (_, source) in data.sources().items():
        rows = sliding(source, opened.tokenizer, seq_len=length, stride=stride)
        size = _batch_size(config.batch_size, opened.layout)
        results[name] = measure(opened, rows, size, name or "evaluating", position_offset=data.position_offset)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(opened.model))
    return Evaluated(parameters, length, stride, results, notes)


def open_model(config: EvaluateConfig, data: DataConfig | None, length: int) -> tuple[Opened, list[str]]:
    """The model of a config for rows of `length` tokens, and notes."""
    assert config.checkpoint is not None
    layout = Layout(config.mesh.build(), config.sharding)
    weights = open_pretrained(config.checkpoint)
    sizes = {axis: size for axis, size in vars(weights.config.dims).items() if size is not None}
    notes = [*weights.notes, *layout.check({"batch": _batch_size(config.batch_size, layout), "seq": length, **sizes})]
    tokenizer, said = _tokenizer(config, data)
    if tokenizer.vocab > sizes["vocab"]:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab} ids, the model {sizes['vocab']}",
            where="tokenizer",
            next="tokenizer=null uses the one beside the model",
        )
    model = load_pretrained(config.checkpoint, config.dtype, layout.shardings(abstract(weights.config)))
    view = policy_view(
        PrecisionConfig(params="float32", compute="float32"),  # as loaded
        RematConfig(policy="none"),
        layout,
        KernelConfig(name="auto", q_block=None, kv_block=None, fused_backward=False),
    )
    return Opened(model, layout, eqx.filter_jit(make_score(view, layout, CHUNK)), tokenizer), notes + said


def measure(opened: Opened, rows: Sliding, batch_size: int, name: str, *, position_offset: int = 0) -> Result:
    """The model on all of `rows`, with a progress bar that is called `name`. `position_offset` is added to their positions."""
    split = rows.split
    positions, documents, windows = Sums(BUCKETS), Sums(split.documents), Sums(rows.windows)
    sharding = opened.layout.sharding(("batch", "seq"), (batch_size, rows.seq_len))
    batches = validation_batches(Shifted(rows, position_offset), sharding, batch_size=batch_size)
    with tqdm(batches, total=-(-len(rows) // batch_size), desc=name, unit=" batches", disable=None) as progress:
        for number, batch in enumerate(progress):
            scores = jax.device_get(opened.score(opened.model, batch))
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
    """Half of a confidence interval of the mean `sum(nats) / sum(weights)` over clusters whose members are alike.

    The mean is a ratio of two sums over clusters; its variance is that of the linearised ratio (Cochran, 1977, "Sampling Techniques",
    section 6.3, which is the cluster-robust variance CR1 of Liang and Zeger, 1986), with quantiles of Student's t for as many clusters
    less one. NaN for a single cluster.
    """
    used = weights > 0
    nats, weights, count = nats[used], weights[used], int(used.sum())
    if count < 2:
        return math.nan
    residuals = nats - nats.sum() / weights.sum() * weights
    error = math.sqrt(count / (count - 1) * math.fsum(residuals**2)) / math.fsum(weights)
    return float(stdtrit(count - 1, (1 + confidence) / 2)) * error


def _data_and_length(config: EvaluateConfig, folder: pathlib.Path) -> tuple[DataConfig, int]:
    """What a run says of itself where the config is silent."""
    saved: dict[str, Any] = read_config(folder) if (folder / CONFIG).is_file() else {}
    data = config.data or (load(saved["data"], "data") if "data" in saved else None)
    if data is None:
        raise ConfigError(
            "this is not a run, whose own data could be taken", where="data", next="data=test data.path=FILE, or another data="
        )
    if config.length:
        return data, config.length
    if "train" in saved:
        return data, saved["train"]["seq_len"]
    assert config.checkpoint is not None
    return data, min(open_pretrained(config.checkpoint).config.context, LONGEST)


def _tokenizer(config: EvaluateConfig, data: DataConfig | None) -> tuple[Tokenizer, list[str]]:
    """The one beside the model, unless another is asked for or the data comes with its own."""
    assert config.checkpoint is not None
    folder = located(config.checkpoint)[0]
    if config.tokenizer is None or data is None:
        return find_tokenizer(folder), []
    chosen = config.tokenizer.build(data)
    try:
        own = find_tokenizer(folder)
    except DataError:
        return chosen, []
    if own.fingerprint == chosen.fingerprint:
        return chosen, []
    whose = "the data was prepared with" if isinstance(config.tokenizer, PreparedTokenizerConfig) else "the tokenizer is"
    return chosen, [f"{whose} another than the model's: {chosen.vocab:,} ids instead of {own.vocab:,}"]


def _batch_size(wanted: int, layout: Layout) -> int:
    """`wanted`, or the next multiple of the devices that split it."""
    ways = math.prod(layout.mesh.shape[name] for name in layout.rules.axes.get("batch", ()))
    return -(-wanted // ways) * ways


def _unseen(rows: Sliding, tokenizer: Tokenizer) -> int:
    """The bytes of the tokens that begin a text, which no one predicts: none where that is BOS."""
    first = np.array([int(rows.split.read(token, token + 1)[0]) for token in rows.firsts.tolist()])
    ids, counts = np.unique(first, return_counts=True)
    return sum(len(tokenizer.decode([i]).encode()) * count for i, count in zip(ids.tolist(), counts.tolist(), strict=True))
