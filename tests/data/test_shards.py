import concurrent.futures
import hashlib
import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_eqx.data.corpus import TextConfig
from llama_eqx.data.encoding import CHUNK, tokenize
from llama_eqx.data.packing import document_bounds
from llama_eqx.data.rows import Tokens
from llama_eqx.data.shards import open_dataset
from llama_eqx.data.tokenizer import BytesTokenizer, CharsTokenizer, Tokenizer, load_tokenizer
from llama_eqx.errors import DataError


class Wide(Tokenizer):
    """Code points above the last id of 16 bits, which is BOS."""

    kind, file, vocab, bos, eos = "wide", "wide", 2**16 + 1000, 2**16 - 1, None
    above = 2**16

    def encode_all(self, texts):
        return [np.array([self.above + ord(character) for character in text], np.int64) for text in texts]

    def _decode(self, ids):
        raise NotImplementedError

    def _definition(self):
        return b""


@pytest.fixture
def corpus(write, text):
    return text(write(a_txt="0123456789", b_txt="é" * 10))


def ids(split):
    return split.read(0, split.tokens)


def folder(data):
    return data.train.shards[0].path.parent


def files(data):
    return sorted(path.relative_to(folder(data)).as_posix() for path in folder(data).rglob("*") if path.is_file())


def test_documents_stand_between_bos_and_eos(corpus):
    data = tokenize(corpus, BytesTokenizer())
    train = [256, *b"012345678", 257, 256, *("é" * 9).encode(), 257]
    val = [256, *b"9", 257, 256, *"é".encode(), 257]
    assert ids(data.train).tolist() == train
    assert ids(data.val).tolist() == val
    assert ids(data.train).dtype == np.uint16
    assert (data.train.tokens, data.train.documents, data.train.bytes) == (len(train), 2, 27)
    assert (data.val.tokens, data.val.documents, data.val.bytes) == (len(val), 2, 3)


def test_a_tokenizer_without_bos_and_eos_adds_none(corpus):
    tokenizer = CharsTokenizer("0123456789é".encode())
    data = tokenize(corpus, tokenizer)
    assert tokenizer.decode(ids(data.train)) == "012345678" + "é" * 9
    assert ids(data.val).tolist() == [9, 10]


def test_a_large_vocabulary_is_kept_whole(corpus):
    data = tokenize(corpus, Wide())
    assert ids(data.train).dtype == np.uint32
    assert ids(data.val).tolist() == [2**16 - 1, 2**16 + ord("9"), 2**16 - 1, 2**16 + ord("é")]


def test_a_corpus_of_several_chunks_is_whole(write, text):
    contents = [str(i) * (CHUNK // 2 - i) for i in range(5)]
    data = tokenize(text(write(**{f"{i}_txt": content for i, content in enumerate(contents)})), BytesTokenizer())
    found = ids(data.train)
    assert data.train.tokens == len(found)
    assert bytes(found[found < 256].astype(np.uint8)).decode() == "".join(content[: int(len(content) * 0.9)] for content in contents)


def test_the_index_tells_what_the_shards_are(corpus):
    data = tokenize(corpus, BytesTokenizer())
    content = (folder(data) / "index.json").read_bytes()
    index = json.loads(content)
    assert data.fingerprint == hashlib.sha256(content).hexdigest()
    assert index["tokenizer"] == BytesTokenizer().fingerprint == load_tokenizer(folder(data) / "tokenizer").fingerprint
    assert (index["dtype"], index["vocab"]) == ("uint16", 258)
    assert index["settings"] == {"corpus": corpus.identity()}
    assert index["sources"] == [{"name": "a.txt"}, {"name": "b.txt"}]
    kinds = [f"{shard['name']}.{kind}.npy" for shard in index["shards"] for kind in shard["sha256"]]
    assert sorted(kinds) == [name for name in files(data) if name.endswith(".npy")]
    for record, split in zip(index["shards"], (data.train, data.val), strict=True):
        counts = {"tokens": split.tokens, "documents": split.documents, "bytes": split.bytes}
        assert index["splits"][split.name] == counts
        assert {name: record[name] for name in counts} == counts
        for kind, sha256 in record["sha256"].items():
            assert hashlib.sha256((folder(data) / f"{record['name']}.{kind}.npy").read_bytes()).hexdigest() == sha256


def test_a_document_is_traced_to_its_file(corpus, write, text):
    data = tokenize(corpus, BytesTokenizer())
    assert [data.val.source(i) for i in range(2)] == ["a.txt", "b.txt"]
    lines = "".join(json.dumps({"text": f"line {i}" * 9}) + "\n" for i in range(90))
    data = tokenize(text(write(c_jsonl=lines)), BytesTokenizer())
    for split in (data.train, data.val):
        assert split.documents
        for i in range(split.documents):
            file, _, line = split.source(i).partition(":")
            if file == "c.jsonl":
                assert bytes(split.document(i)[1:-1].tolist()).decode() == f"line {int(line) - 1}" * 9


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=6), min_size=1, max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
def test_shards_read_as_one_array(split, shards, data):
    read = split(*shards, vocab=300)
    documents = [document for shard in shards for document in shard]
    flat = [id for document in documents for id in document]
    firsts = np.cumsum([0, *map(len, documents)])[:-1]
    of = np.repeat(np.arange(len(documents)), list(map(len, documents)))
    assert (read.tokens, read.documents, read.bytes) == (len(flat), len(documents), len(flat))
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert read.read(start, stop).tolist() == flat[start:stop]
    assert read.starts(start, stop).tolist() == [first for first in firsts if start <= first < stop]
    assert list(read.documents_in(start, stop)) == sorted(set(of[start:stop].tolist()))
    assert [read.document(i).tolist() for i in range(len(documents))] == documents
    for outside in (lambda: read.read(-1, 1), lambda: read.read(0, len(flat) + 1), lambda: read.document(-1)):
        with pytest.raises(IndexError):
            outside()
    with pytest.raises(IndexError):
        read.document(len(documents))


def test_what_was_read_can_be_written_to(split):
    read = split([[1, 2, 3]])
    read.read(0, 3)[:] = 0
    assert read.read(0, 3).tolist() == [1, 2, 3]


def test_a_second_call_reads_the_cache_and_another_cache_agrees(corpus, cache, monkeypatch):
    first = tokenize(corpus, BytesTokenizer())
    monkeypatch.setenv("LLAMA_EQX_CACHE", f"{cache}-2")
    assert tokenize(corpus, BytesTokenizer()).fingerprint == first.fingerprint
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(cache))
    monkeypatch.setattr(BytesTokenizer, "encode_all", lambda *_: pytest.fail("encoded again"))
    assert tokenize(corpus, BytesTokenizer()) == first


def test_other_text_split_or_tokenizer_gives_other_shards(write, text, corpus):
    folder = write()
    found = [tokenize(corpus, BytesTokenizer()), tokenize(corpus, CharsTokenizer("0123456789é".encode()))]
    found += [tokenize(text(folder, 0.2), BytesTokenizer()), tokenize(text(folder, 0.2, "tuning"), BytesTokenizer())]
    write(a_txt="0123456788")
    found.append(tokenize(corpus, BytesTokenizer()))
    assert len({data.fingerprint for data in found}) == len({data.train.shards[0].path for data in found}) == 5


def test_text_that_changes_meanwhile_is_not_kept_for_what_it_was(write, text, cache, monkeypatch):
    corpus, identity = text(write(a_txt="0123456789" * 9)), TextConfig.identity

    def then_more(self):
        found = identity(self)
        write(b_txt="more")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TextConfig, "identity", then_more)
        with pytest.raises(DataError, match="the files changed while they were read"):
            tokenize(corpus, BytesTokenizer())
    assert list((cache / "tokens").iterdir()) == []
    assert tokenize(corpus, BytesTokenizer()).train.documents == 2


def test_writers_at_the_same_time_agree(corpus, cache):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tokenize(corpus, BytesTokenizer()), range(8)))
    assert len(set(found)) == 1
    assert len(list((cache / "tokens").iterdir())) == 1
    assert found[0].train.read(0, 1) == 256


FILES = [f"{split}-00000.{kind}.npy" for split in ("train", "val") for kind in ("ids", "offsets", "origins")]


def changed(path, damage):
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "short": content[:-1], "long": content + b"?", "changed": content[:-1] + bytes([content[-1] ^ 1])}[damage]
        )


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "long", "changed"])
def test_every_damaged_file_is_named(corpus, damage):
    data = tokenize(corpus, BytesTokenizer())
    for name in FILES:
        changed(folder(data) / name, damage)
    with pytest.raises(DataError, match="damaged") as error:
        tokenize(corpus, BytesTokenizer())
    said = {"missing": "No such file", "empty": ": 0 bytes instead of", "changed": "sha256"}.get(damage, "bytes instead of")
    assert [line.split(":")[0] for line in error.value.what.splitlines()[1:]] == FILES
    assert all(said in line for line in error.value.what.splitlines()[1:])
    assert error.value.where == str(folder(data))
    assert "delete this folder" in error.value.next


def test_what_is_too_large_to_be_hashed_is_hashed_when_asked(corpus, monkeypatch):
    data = tokenize(corpus, BytesTokenizer())
    changed(folder(data) / FILES[0], "changed")
    monkeypatch.setattr("llama_eqx.data.shards.VERIFIED", 1)
    open_dataset(folder(data), remedy="")
    with pytest.raises(DataError, match="sha256"):
        open_dataset(folder(data), remedy="", verify=True)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"format": 2}', "count", "format", None])
def test_an_index_that_makes_no_sense_is_named(corpus, content):
    index = folder(tokenize(corpus, BytesTokenizer())) / "index.json"
    said = json.loads(index.read_text())
    if content == "count":
        said["splits"]["val"]["tokens"] += 1
        content = json.dumps(said)
    elif content == "format":
        content = json.dumps({**said, "format": 1})
    index.unlink() if content is None else index.write_text(content)
    with pytest.raises(DataError) as error:
        tokenize(corpus, BytesTokenizer())
    assert str(index.parent) in error.value.where
    assert "delete this folder" in error.value.next


@pytest.mark.parametrize("above", [-2 * 2**16, 10**6])
def test_an_id_outside_the_vocabulary_is_not_written(corpus, monkeypatch, above):
    monkeypatch.setattr(Wide, "above", above)
    with pytest.raises(DataError, match=f"gave the id {above + ord('0')}, .* vocabulary of {Wide.vocab}"):
        tokenize(corpus, Wide())


@pytest.mark.parametrize("wrong", [-7, 0, 99, "same as before", "as after"])
@pytest.mark.parametrize("at", range(9))
def test_an_offset_out_of_order_is_named_by_whoever_it_would_mislead(split, wrong, at):
    """Every lookup gives what it gave before, or says which document."""
    read = split([[1, 2], [3]], [[i] * (1 + i % 3) for i in range(8)])
    tokens, shard = Tokens(read), read.shards[1]
    stretches = [(i, j) for i in range(read.tokens) for j in range(i, read.tokens + 1, 3)]
    lookups = [
        *((read.bounds, i) for i in range(read.documents)),
        *((function, *stretch) for function in (read.starts, read.documents_in) for stretch in stretches),
        *((tokens.documents_before, np.array([i])) for i in range(read.tokens + 1)),
        *((tokens.starts, np.array([i, 3]), n) for n in range(1, 6) for i in range(read.tokens - n + 1)),
        (document_bounds, read),
    ]
    good = [found(function(*arguments)) for function, *arguments in lookups]
    offsets = np.load(shard.file("offsets"), mmap_mode="r+")
    before = offsets.copy()
    offsets[at] = {"same as before": before[at - 1], "as after": before[(at + 1) % 9]}.get(wrong, wrong)
    if offsets[at] == before[at]:
        return
    refused = []
    for (function, *arguments), known in zip(lookups, good, strict=True):
        try:
            assert found(function(*arguments)) == known
        except DataError as error:
            refused.append(error.where)
    assert 3 <= len(refused) < len(lookups)
    assert {f"{shard.file('offsets')}, document {i}" for i in (at - 1, at)} >= set(refused)


def found(what):
    """Of a lookup, to be compared."""
    return list(what) if isinstance(what, range) else [np.asarray(part).tolist() for part in what]


def test_a_file_of_another_shape_is_named_when_it_is_read(split):
    read = split([[1, 2, 3]])
    np.save(read.shards[0].file("ids"), np.zeros(3, np.int64))
    with pytest.raises(DataError, match="int64"):
        read.read(0, 1)


@pytest.mark.parametrize(("content", "split"), [("a", "train"), ("ab" * 4, "train")])
def test_an_empty_split_is_an_error_and_leaves_nothing(write, text, cache, content, split):
    with pytest.raises(DataError, match=f"{split} split of this corpus is empty") as error:
        tokenize(text(write(a_txt=content), 0.99), BytesTokenizer())
    assert error.value.next
    assert not list((cache / "tokens").iterdir())


def test_token_data_survives_a_pickle(corpus):
    data = tokenize(corpus, BytesTokenizer())
    ids(data.train)
    sent = pickle.dumps(data)
    assert len(sent) < 2000
    assert pickle.loads(sent) == data
    assert ids(pickle.loads(sent).train).tolist() == ids(data.train).tolist()
