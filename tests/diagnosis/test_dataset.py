"""Damaged token shards: what is wrong, in which file and from which token."""

import json

import numpy as np
import pytest

from llama_eqx import load_config
from llama_eqx.data.encoding import tokenize
from llama_eqx.data.prepare import prepare
from llama_eqx.data.tokenizer import BytesTokenizer, CharsTokenizer
from llama_eqx.diagnosis.examination import examine
from llama_eqx.doctor import published


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 20)
    config = load_config("data=text", "data.validation_fraction=0.2", f"data.path={tmp_path / 'text.txt'}").data
    return tokenize(config, BytesTokenizer()).train.shards[0].path.parent


def rehash(folder):
    """An index that agrees with the files, so that only their content can tell."""
    import hashlib

    index = json.loads((folder / "index.json").read_text())
    for record in index["shards"]:
        for kind in record["sha256"]:
            record["sha256"][kind] = hashlib.sha256((folder / f"{record['name']}.{kind}.npy").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


def put(name, index, value):
    def change(folder):
        ids = np.load(folder / name)
        ids[index] = value
        np.save(folder / name, ids)
        rehash(folder)

    return change


def flip(folder):
    content = bytearray((folder / "train-00000.ids.npy").read_bytes())
    content[-5] ^= 1
    (folder / "train-00000.ids.npy").write_bytes(content)


BROKEN = {
    "flipped bit": (flip, "train-00000.ids.npy", "its sha256 is not that of the index"),
    "cut short": (lambda f: (f / "val-00000.ids.npy").write_bytes(b"\x93NUMPY"), "val-00000.ids.npy", "bytes instead of"),
    "missing": (lambda f: (f / "train-00000.offsets.npy").unlink(), "train-00000.offsets.npy", "No such file"),
    "foreign ids": (
        put("train-00000.ids.npy", [7, 9], 300),
        "train-00000.ids.npy",
        "2 ids are not in the vocabulary of 258; the first is 300 at token 7",
    ),
    "offsets": (put("train-00000.offsets.npy", 0, 1), "train-00000.offsets.npy", "offsets of documents do not rise"),
    "other tokenizer": (lambda f: CharsTokenizer(b"abc").save(f / "tokenizer"), "tokenizer", "prepared with the tokenizer"),
    "no index to read": (lambda f: (f / "index.json").write_text("{"), "index.json", "no index of token shards"),
    "pointer": (
        lambda f: (f / "train-00000.ids.npy").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "train-00000.ids.npy",
        "Git LFS pointer",
    ),
}


def test_a_good_dataset_gives_no_finding(folder):
    report = examine(str(folder), published, weights=True)
    assert report.findings == ()
    assert "train: 306 tokens in 1 documents, 304 bytes of text" in str(report)
    assert "tokenizer: bytes, 258 ids" in str(report)


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_datasets(folder, broken):
    break_, where, words = BROKEN[broken]
    break_(folder)
    report = examine(str(folder), published, weights=True)
    assert [finding.severity for finding in report.findings if finding.where == where and words in finding.what] == ["error"], str(report)
    assert report.wrong


def test_a_dataset_of_which_nothing_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("some words")
    options = [f"input={tmp_path / 'a.txt'}", f"output={tmp_path / 'out'}", "tokenizer=bytes", "validation_fraction=0", "prepare.workers=1"]
    prepare(load_config(*options, name="prepare"))
    (finding,) = examine(str(tmp_path / "out"), published, weights=True).findings
    assert (finding.severity, finding.what) == ("warning", "the val split is empty")
    assert "python -m llama_eqx.prepare validation_fraction=" in finding.next
