"""Where the rows of a run's batches came from."""

import pathlib
from typing import NamedTuple

import numpy as np

from llama_eqx.checkpoint.native import CONFIG, MEND, configured, read_config
from llama_eqx.config import Config
from llama_eqx.data.dataset import Dataset, open_data
from llama_eqx.data.pipeline import Parts
from llama_eqx.data.tokenizer import load_tokenizer
from llama_eqx.errors import ConfigError, DataError
from llama_eqx.files import reading


class ProvenanceConfig(Config):
    """Row `row` (from 0) of the batch of step `step` (from 1, as in metrics.jsonl) of the run in `run_dir`."""

    run_dir: str | None
    step: int | None
    row: int | None

    def check(self) -> None:
        given = {"run_dir": self.run_dir, "step": self.step, "row": self.row}
        if missing := [f"{name}=" for name, value in given.items() if value is None]:
            raise ConfigError(f"not given: {' '.join(missing)}", next="run_dir=FOLDER step=1234 row=3")
        assert self.step is not None
        assert self.row is not None
        if self.step < 1 or self.row < 0:
            raise ConfigError(f"step={self.step} row={self.row}: steps count from 1 and rows from 0", where="step")


class Stretch(NamedTuple):
    """Tokens `begin` up to `end` of a document that has `tokens`. It is number `document` of `source`, the name of a component or ""."""

    source: str
    document: int
    origin: str
    begin: int
    end: int
    tokens: int
    ids: np.ndarray


def provenance(config: ProvenanceConfig) -> str:
    """Returns the documents of a row and their text. They follow from `config.yaml` and the data; the run need not have come so far.

    Raises `CheckpointError` when `run_dir` is no run, `DataError` when its data cannot be read or has changed.
    """
    assert config.run_dir is not None
    assert config.step is not None
    assert config.row is not None
    run_dir = pathlib.Path(config.run_dir)
    saved = read_config(run_dir)
    with reading(run_dir / CONFIG, DataError, f"this {CONFIG} is not that of a run", next=MEND):
        batch_size, seq_len, seed = (int(value) for value in (saved["train"]["batch_size"], saved["train"]["seq_len"], saved["seed"]))
        distinct, fingerprint = saved["train"].get("distinct_rows"), saved["data_fingerprint"]
    settings = configured(run_dir, saved, "data")
    if config.row >= batch_size:
        raise ConfigError(f"a batch of this run has the rows 0 to {batch_size - 1}", where="row")
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    data = open_data(settings, tokenizer, seq_len=seq_len, seed=seed, distinct_rows=distinct)
    if data.fingerprint != fingerprint:
        raise DataError("the data is no longer what the run was trained on", where=f"data in {run_dir / CONFIG}", next="bring it back")
    number = int(Parts(data.train, data.order, batch_size).numbers(config.step - 1)[config.row])
    lines = [f"step {config.step}, row {config.row}: row {number:,} of the {len(data.train):,} to train on"]
    for stretch in stretches(data, number):
        of = f"{stretch.source}: " if stretch.source else ""
        where = f"tokens {stretch.begin:,} to {stretch.end:,} of {stretch.tokens:,}"
        lines += ["", f"{of}{stretch.origin} (document {stretch.document:,}), {where}", tokenizer.decode(stretch.ids)]
    return "\n".join(lines)


def stretches(data: Dataset, row: int) -> list[Stretch]:
    """The stretches of documents in a training row, in order."""
    found, source = [], data.names[data.train.source(row)]
    for split, begin, end in data.train.pieces(row):
        for document in split.documents_in(begin, end):
            first, last = split.bounds(document)
            a, b = max(begin, first), min(end, last)
            found.append(Stretch(source, document, split.source(document), a - first, b - first, last - first, split.read(a, b)))
    return found
