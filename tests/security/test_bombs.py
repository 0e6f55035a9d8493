"""Small files that ask for much, or lie nested too deep to be read, end with a sentence."""

import gzip

import pytest

from llama_eqx.checkpoint.native import CONFIG, read_config
from llama_eqx.data.chat import template_in
from llama_eqx.data.shards import SUMS, check_sealed, open_dataset
from llama_eqx.data.tokenizer import load_tokenizer
from llama_eqx.data.tokenizer.base import MARK
from llama_eqx.errors import CheckpointError, DataError
from llama_eqx.studies.runs import read_kept, read_run

DEEP = "[" * 200_000
READERS = {
    MARK: load_tokenizer,
    "tokenizer_config.json": template_in,
    "index.json": lambda folder: open_dataset(folder, remedy=""),
    SUMS: check_sealed,
    "study.json": read_run,
    "run.jsonl.gz": lambda folder: read_kept(folder / "run.jsonl.gz"),
}


@pytest.mark.parametrize("content", [DEEP, "1" * 5000], ids=["nested", "digits"])
@pytest.mark.parametrize("name", READERS)
def test_json_that_python_cannot_read(tmp_path, name, content):
    (tmp_path / CONFIG).write_text("seed: 0")
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    with pytest.raises(DataError):
        READERS[name](tmp_path)


def test_aliases_that_multiply(tmp_path):
    """Seven lines that stand for 5 million letters. A few more, and no machine could hold them."""
    lines = ["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 8))]
    (tmp_path / CONFIG).write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match="line 2 has the alias"):
        read_config(tmp_path)
