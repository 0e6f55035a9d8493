import gzip
import itertools
import json
import random

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Gives each test a cache folder of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(folder))
    return folder


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes files into a folder of text and returns the folder."""

    def write(**files):
        for name, content in files.items():
            path = tmp_path / "text" / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "text"

    return write


@pytest.fixture
def text():
    """Returns a function that makes the config of data=text."""
    from llama_eqx.data.corpus import TextConfig

    return lambda path, fraction=0.1, holdout="validation", on_error="refuse": TextConfig(
        prompt="",
        position_offset=0,
        rows="windows",
        long_documents="refuse",
        validation_fraction=fraction,
        holdout=holdout,
        path=None if path is None else str(path),
        on_error=on_error,
    )


@pytest.fixture
def split(tmp_path):
    """`split([[1, 2], [3]], [[4]])` is a split of two shards, with those documents."""
    import numpy as np

    from llama_eqx.data.shard import Shard, token_dtype
    from llama_eqx.data.shards import ShardWriter, Split

    made = itertools.count()

    def split(*shards, vocab=2**16, name="train"):
        number, written = next(made), []
        for i, documents in enumerate(shards):
            ids = np.concatenate([np.asarray(document, token_dtype(vocab)) for document in documents])
            with ShardWriter(tmp_path / f"{name}-{number}-{i}", vocab) as writer:
                origins = [[0, i] for i in range(1, len(documents) + 1)]
                writer.add(ids, np.array([len(document) for document in documents]), len(ids), np.array(origins))
                writer.finish()
            written.append(Shard(writer.path, writer.tokens, writer.documents, writer.bytes, vocab))
        return Split(tuple(written), name)

    return split


@pytest.fixture
def corpus(tmp_path):
    """A folder of files of every kind, and its documents in order as (source, text)."""
    import pyarrow.parquet

    folder, draw, expected = tmp_path / "corpus", random.Random(0), []
    folder.mkdir()

    def text():
        return "".join(draw.choice("aé\n ") for _ in range(draw.randint(1, 60))) if draw.random() < 0.8 else "again and again"

    def lines(name, count):
        found = [text() for _ in range(count)]
        expected.extend((f"{name}:{2 * i + 1}", content) for i, content in enumerate(found))
        return "".join(json.dumps({"text": content}) + "\n\n" for content in found).encode()

    for i in range(3):
        (folder / f"a{i}.txt").write_text(content := text())
        expected.append((f"a{i}.txt", content))
    (folder / "b.jsonl").write_bytes(lines("b.jsonl", 120))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines("c.jsonl.gz", 30)))
    rows = [text() for _ in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "d.parquet", row_group_size=7)
    expected += [(f"d.parquet:{i}", content) for i, content in enumerate(rows, 1)]
    (folder / "e.md").write_text(content := text())
    return folder, [*expected, ("e.md", content)]
