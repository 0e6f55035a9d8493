import hashlib
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llama_eqx.data.shards import CHUNK, tokenize
from llama_eqx.data.tokenizer import BytesTokenizer, CharsTokenizer, Tokenizer
from llama_eqx.errors import DataError


class Wide(Tokenizer):
    """Code points above the last id of 16 bits, which is BOS."""

    kind, vocab, bos, eos = "wide", 2**16 + 1000, 2**16 - 1, None

    def encode_all(self, texts):
        return [np.array([2**16 + ord(character) for character in text], np.int64) for text in texts]

    def _decode(self, ids):
        raise NotImplementedError

    def _definition(self):
        return b""


@pytest.fixture
def corpus(write, text):
    return text(write(a_txt="0123456789", b_txt="é" * 10))


def test_documents_stand_between_bos_and_eos(corpus):
    data = tokenize(corpus, BytesTokenizer())
    train = [256, *b"012345678", 257, 256, *("é" * 9).encode(), 257]
    val = [256, *b"9", 257, 256, *"é".encode(), 257]
    assert data.train.ids().tolist() == train
    assert data.val.ids().tolist() == val
    assert data.train.ids().dtype == np.uint16
    assert (data.train.tokens, data.train.documents, data.train.bytes) == (len(train), 2, 27)
    assert (data.val.tokens, data.val.documents, data.val.bytes) == (len(val), 2, 3)


def test_a_tokenizer_without_bos_and_eos_adds_none(corpus):
    tokenizer = CharsTokenizer("0123456789é".encode())
    data = tokenize(corpus, tokenizer)
    assert tokenizer.decode(data.train.ids()) == "012345678" + "é" * 9
    assert data.val.ids().tolist() == [9, 10]


def test_a_large_vocabulary_is_kept_whole(corpus):
    data = tokenize(corpus, Wide())
    assert data.train.ids().dtype == np.uint32
    assert data.val.ids().tolist() == [2**16 - 1, 2**16 + ord("9"), 2**16 - 1, 2**16 + ord("é")]


def test_a_corpus_of_several_chunks_is_whole(write, text):
    contents = [str(i) * (CHUNK // 2 - i) for i in range(5)]
    data = tokenize(text(write(**{f"{i}_txt": content for i, content in enumerate(contents)})), BytesTokenizer())
    ids = data.train.ids()
    assert data.train.tokens == len(ids)
    assert bytes(ids[ids < 256].astype(np.uint8)).decode() == "".join(content[: int(len(content) * 0.9)] for content in contents)


def test_the_index_tells_what_the_shards_are(corpus):
    data = tokenize(corpus, BytesTokenizer())
    content = (data.train.path.parent / "index.json").read_bytes()
    index = json.loads(content)
    assert data.fingerprint == hashlib.sha256(content).hexdigest()
    assert index["tokenizer"] == BytesTokenizer().fingerprint
    assert index["data"] == corpus.identity()
    for name, split in (("train", data.train), ("val", data.val)):
        assert index[name] == {
            "tokens": split.tokens,
            "documents": split.documents,
            "bytes": split.bytes,
            "sha256": hashlib.sha256(split.path.read_bytes()).hexdigest(),
        }


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
    assert len({data.fingerprint for data in found}) == len({data.train.path for data in found}) == 5


def test_writers_at_the_same_time_agree(corpus, cache):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tokenize(corpus, BytesTokenizer()), range(8)))
    assert len(set(found)) == 1
    assert len(list((cache / "tokens").iterdir())) == 1
    assert found[0].train.ids()[0] == 256


@pytest.mark.parametrize("damage", ["index.json", "train.npy", "val.npy", "short", "empty", "count"])
def test_damaged_shards_are_named(corpus, damage):
    folder = tokenize(corpus, BytesTokenizer()).train.path.parent
    if damage == "short":
        (folder / "val.npy").write_bytes((folder / "val.npy").read_bytes()[:-1])
    elif damage == "count":
        index = json.loads((folder / "index.json").read_text())
        index["val"]["tokens"] += 1
        (folder / "index.json").write_text(json.dumps(index))
    elif damage == "empty":
        (folder / "index.json").write_text("{}")
    else:
        (folder / damage).unlink()
    with pytest.raises(DataError, match="damaged") as error:
        tokenize(corpus, BytesTokenizer())
    assert error.value.where == str(folder)
    assert "delete this folder" in error.value.next


@pytest.mark.parametrize(("content", "split"), [("a", "train"), ("ab" * 4, "train")])
def test_an_empty_split_is_an_error_and_leaves_nothing(write, text, cache, content, split):
    with pytest.raises(DataError, match=f"{split} split of this corpus is empty") as error:
        tokenize(text(write(a_txt=content), 0.99), BytesTokenizer())
    assert error.value.next
    assert not list((cache / "tokens").iterdir())


def test_token_data_survives_a_pickle(corpus):
    data = tokenize(corpus, BytesTokenizer())
    assert pickle.loads(pickle.dumps(data)) == data
