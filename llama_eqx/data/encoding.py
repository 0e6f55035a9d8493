"""Encodes texts as ids, and as a dataset of them in the cache."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llama_eqx.data.cache import cache_dir, publish
from llama_eqx.data.corpus import DataConfig, Part
from llama_eqx.data.prepared import PreparedConfig
from llama_eqx.data.shard import AGAIN, token_dtype
from llama_eqx.data.shards import DELETE, FORMAT, ShardWriter, TokenData, open_dataset, write_index
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import DataError

CHUNK = 2**22  # characters encoded at once


def encode(texts: Sequence[str], tokenizer: Tokenizer, *, bos: bool, eos: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of all texts one after another, in the dtype on disk, and the number of ids of each text, 0 if the tokenizer finds
    none.

    `bos` and `eos` say whether each text is put between those ids, if the tokenizer has them.

    Raises `DataError` for what the tokenizer cannot encode, and for ids that are not in its vocabulary.
    """
    before, after = (
        np.array([id] if asked and id is not None else [], np.int32) for asked, id in ((bos, tokenizer.bos), (eos, tokenizer.eos))
    )
    rows = tokenizer.encode_all(texts)
    around = len(before) + len(after)
    lengths = np.array([len(row) + around if len(row) else 0 for row in rows], np.int64)
    parts = [part for row in rows if len(row) for part in (before, row, after)] if around else rows
    ids = np.concatenate([np.empty(0, np.int32), *parts])
    if len(ids) and not (ids.min() >= 0 and ids.max() < tokenizer.vocab):
        wrong = next(int(id) for id in ids if not 0 <= id < tokenizer.vocab)
        raise DataError(f"the tokenizer gave the id {wrong}, which is not in its vocabulary of {tokenizer.vocab}")
    return ids.astype(token_dtype(tokenizer.vocab)), lengths


def tokenize(data: DataConfig, tokenizer: Tokenizer) -> TokenData:
    """Returns the data as ids: as prepared, or from the cache if the same tokenizer encoded the same text before, or newly encoded.

    Raises `DataError` when a split is empty or the text changes meanwhile, and as `open_dataset` does; `StorageError` when the cache cannot
    be written.
    """
    if isinstance(data, PreparedConfig):
        return open_dataset(data.folder, remedy=AGAIN, tokenizer=tokenizer, verify=data.verify)
    identity = {"corpus": data.identity()}
    key = hashlib.sha256(json.dumps([FORMAT, identity, tokenizer.fingerprint]).encode()).hexdigest()
    folder = publish(cache_dir() / "tokens" / key, lambda folder: _tokenize(folder, data, tokenizer, identity))
    return open_dataset(folder, remedy=DELETE)


def _tokenize(folder: Path, data: DataConfig, tokenizer: Tokenizer, identity: dict[str, Any]) -> None:
    names: dict[str, int] = {}
    with (
        ShardWriter(folder / "train-00000", tokenizer.vocab) as train,
        ShardWriter(folder / "val-00000", tokenizer.vocab) as val,
        tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=None) as progress,
    ):
        writers = {"train": train, "val": val}
        for chunk in _chunks(data.parts()):
            ids, lengths = encode([document.text for _, document in chunk], tokenizer, bos=True, eos=True)
            sizes = np.array([len(document.text.encode()) for _, document in chunk])
            ends = np.cumsum(lengths)
            for (split, document), size, length, end in zip(chunk, sizes.tolist(), lengths, ends, strict=True):
                if length:
                    origin = np.array([[names.setdefault(document.name, len(names)), 0]])
                    writers[split].add(ids[end - length : end], np.array([length]), size, origin)
            progress.update(int(sizes.sum()))
        for split, writer in writers.items():
            none_wanted = split == "train" and getattr(data, "validation_fraction", 0) == 1  # all of it is held out
            if not writer.tokens and not none_wanted:
                raise DataError(
                    f"the {split} split of this corpus is empty",
                    where="data.validation_fraction",
                    next="more text, or another data.validation_fraction",
                )
        data.require(identity["corpus"])
        shards = [(split, writer.finish()) for split, writer in writers.items()]
    write_index(folder, tokenizer, shards, [{"name": name} for name in names], settings=identity)


def _chunks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts in lists of about `CHUNK` characters."""
    chunk, size = [], 0
    for part in parts:
        chunk.append(part)
        size += len(part.document.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
