"""Tokens on disk: a file of ids for each split, and an index that says what they are."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llama_eqx.data.cache import cache_dir as cache_dir
from llama_eqx.data.cache import publish
from llama_eqx.data.corpus import DataConfig, Part
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import DataError

FORMAT = 1  # counts the changes of what is written: shards of another format are made anew
SPLITS = ("train", "val")
CHUNK = 2**22  # characters that are encoded at once


@dataclass(frozen=True)
class Split:
    """A file of token ids: documents one after another, each between BOS and EOS where the tokenizer has them.

    `bytes` are those of the text in UTF-8, `tokens` include BOS and EOS.
    """

    path: Path
    tokens: int
    documents: int
    bytes: int

    def ids(self) -> np.ndarray:
        """The ids, mapped from disk."""
        return np.load(self.path, mmap_mode="r")


@dataclass(frozen=True)
class TokenData:
    """`fingerprint` is a sha256 of the corpus, its split, the tokenizer and the ids."""

    train: Split
    val: Split
    fingerprint: str


def tokenize(data: DataConfig, tokenizer: Tokenizer) -> TokenData:
    """The corpus as ids, from the cache when the same text was encoded by the same tokenizer before.

    Raises `DataError` when a split is empty, `StorageError` when the cache cannot be written.
    """
    identity = {"format": FORMAT, "data": data.identity(), "tokenizer": tokenizer.fingerprint}
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return _opened(publish(cache_dir() / "tokens" / key, lambda folder: _write(folder, data, tokenizer, identity)))


def _write(folder: Path, data: DataConfig, tokenizer: Tokenizer, identity: dict[str, Any]) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab <= 2**16 else "<u4")
    bos, eos = (np.array([] if i is None else [i], dtype) for i in (tokenizer.bos, tokenizer.eos))
    index: dict[str, dict[str, Any]] = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
    with (
        open(folder / "train.npy", "w+b") as train,
        open(folder / "val.npy", "w+b") as val,
        tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=None) as progress,
    ):
        files = {"train": train, "val": val}
        for file in files.values():
            _header(file, 0, dtype)
        for chunk in _chunks(data.parts()):
            encoded = tokenizer.encode_all([document.text for _, document in chunk])
            for (split, document), ids in zip(chunk, encoded, strict=True):
                row = np.concatenate([bos, ids.astype(dtype), eos])
                files[split].write(row.tobytes())
                size = len(document.text.encode())
                for name, count in {"tokens": len(row), "documents": 1, "bytes": size}.items():
                    index[split][name] += count
                progress.update(size)
        for split, file in files.items():
            if not index[split]["tokens"]:
                raise DataError(
                    f"the {split} split of this corpus is empty",
                    where="data.validation_fraction",
                    next="more text, or another data.validation_fraction",
                )
            _header(file, index[split]["tokens"], dtype)
            file.seek(0)
            index[split]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    (folder / "index.json").write_text(json.dumps({**identity, **index}, indent=1) + "\n")


def _header(file: Any, tokens: int, dtype: np.dtype) -> None:
    """numpy leaves room for the first axis of a file to grow, so that the length can be filled in when it is known."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)})


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


def _opened(folder: Path) -> TokenData:
    try:
        content = (folder / "index.json").read_bytes()
        index = json.loads(content)
        train, val = (
            Split(folder / f"{name}.npy", index[name]["tokens"], index[name]["documents"], index[name]["bytes"]) for name in SPLITS
        )
        if any(split.ids().shape != (split.tokens,) for split in (train, val)):
            raise ValueError("a file has another number of tokens than the index says")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"damaged token shards: {error}", where=str(folder), next="delete this folder; it is made anew") from error
    return TokenData(train, val, hashlib.sha256(content).hexdigest())
