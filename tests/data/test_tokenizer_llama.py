"""Llama's own tokenizer files against sentencepiece, tiktoken, transformers and what Meta's code gives."""

import base64
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_eqx.data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer
from llama_eqx.data.tokenizer.export import tokenizer_json
from llama_eqx.data.tokenizer.huggingface import read_huggingface

PIECES = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "don't",
    "I'LL",
    "12345",
    "<s>",
    "</s>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "[INST]",
    "ſ",
    "\u0130",
]
# Hypothesis draws rare characters; text is mostly of those that tokens are made of.
texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.text(st.characters(max_codepoint=0x7F), max_size=20)
    | st.text("你好世界привет مرحبا नमस्ते 👩‍👧éàü", max_size=10)
    | st.sampled_from(PIECES),
    max_size=8,
).map("".join)
few = settings(deadline=None, max_examples=200)
many = settings(deadline=None, max_examples=10_000)


@pytest.fixture(scope="module")
def llama2(test_data):
    return SentencePieceTokenizer((test_data / "llama2_tokenizer.model").read_bytes())


@pytest.fixture(scope="module")
def llama3(test_data):
    return TiktokenTokenizer((test_data / "llama3_tokenizer.model").read_bytes(), chat="llama3")


@pytest.fixture(scope="module")
def spiece(test_data):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(str(test_data / "llama2_tokenizer.model"))


@pytest.fixture(scope="module")
def meta(test_data):
    """The Tokenizer of github.com/meta-llama/llama3, but for its cutting of long text."""
    import tiktoken

    lines = (test_data / "llama3_tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "reserved_special_token_2"]
    names += ["reserved_special_token_3", "start_header_id", "end_header_id", "reserved_special_token_4", "eot_id"]
    names += [f"reserved_special_token_{i}" for i in range(5, 251)]
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    special = {f"<|{name}|>": 128_000 + i for i, name in enumerate(names)}
    return tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def converted(test_data, meta, tmp_path_factory):
    """transformers' reading of Llama 3's file, and the folder that it writes."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = tmp_path_factory.mktemp("llama3")
    special = sorted(meta._special_tokens, key=meta._special_tokens.get)
    library = TikTokenConverter(str(test_data / "llama3_tokenizer.model"), meta._pat_str, extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    tokenizer.save_pretrained(folder)
    return (lambda: tokenizer), folder


@pytest.fixture(scope="module")
def hf(converted):
    return read_huggingface(converted[1])


def test_the_known_ids(llama2, llama3):
    assert llama2.encode("Hello world, 你好  x") == [15043, 3186, 29892, 29871, 30919, 31076, 29871, 921]
    ids = llama3.encode("<|begin_of_text|>This is a test sentence.<|end_of_text|>", special=True)
    assert ids == [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert (llama2.bos, llama2.eos, llama2.pad, llama2.stop, llama2.vocab) == (1, 2, None, (2,), 32_000)
    assert (llama3.bos, llama3.eos, llama3.pad, llama3.stop, llama3.vocab) == (128000, 128001, None, (128001, 128009), 128_256)


def test_the_names_of_llama_3s_special_tokens(llama3, meta):
    assert llama3.special == meta._special_tokens
    later = TiktokenTokenizer(llama3.ranks)
    assert (later.pad, later.stop) == (128004, (128001, 128008, 128009))
    known = {"finetune_right_pad_id": 128004, "start_header_id": 128006, "end_header_id": 128007, "eom_id": 128008, "eot_id": 128009}
    known |= {"python_tag": 128010, "reserved_special_token_2": 128005, "reserved_special_token_3": 128011}
    known |= {"reserved_special_token_247": 128255}  # as tokenizer.json of Llama-3.1-8B has them
    assert {name: later.special[f"<|{name}|>"] for name in known} == known
    assert sorted(later.special.values()) == list(range(128_000, 128_256))


def equal_to_sentencepiece(llama2, spiece, text):
    assert llama2.encode(text) == spiece.encode(text)
    assert llama2.decode(spiece.encode(text)) == spiece.decode(spiece.encode(text))


def equal_to_tiktoken(llama3, meta, text):
    ids = llama3.encode(text)
    assert ids == meta.encode_ordinary(text)
    assert llama3.decode(ids) == text
    assert llama3.encode(text, special=True) == meta.encode(text, allowed_special="all")


def equal_to_transformers(llama3, hf, converted, text):
    reference = converted[0]()
    special = reference(text, add_special_tokens=False).input_ids
    ordinary = reference(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert hf.encode(text) == ordinary
    assert hf.encode(text, special=True) == special
    assert hf.decode(ordinary) == reference.decode(ordinary, skip_special_tokens=True) == text
    assert llama3.encode(text) == ordinary


@pytest.fixture(scope="module")
def exported(llama2, llama3):
    """What is written for transformers, by its library."""
    from tokenizers import Tokenizer

    found = {"llama2": Tokenizer.from_str(tokenizer_json(llama2)), "llama3": Tokenizer.from_str(tokenizer_json(llama3))}
    for library in found.values():
        library.encode_special_tokens = True
    return found


def equal_to_exported(exported, tokenizer, text):
    assert exported.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    assert exported.encode(text).ids == [tokenizer.bos, *tokenizer.encode(text)]
    assert exported.decode(tokenizer.encode(text), skip_special_tokens=False) == tokenizer.decode(tokenizer.encode(text))


@few
@given(text=texts)
def test_an_exported_tokenizer_is_equal_to_llamas(exported, llama2, llama3, text):
    equal_to_exported(exported["llama2"], llama2, text)
    equal_to_exported(exported["llama3"], llama3, text)


def test_runs_of_one_character_are_merged_from_the_left(exported, llama2, llama3):
    for character in " =-.*#/a\u2581\n":
        for length in (2, 3, 5, 7, 15, 16, 17, 18, 20, 33, 50, 61):
            for text in (character * length, f"x{character * length}y", f"  {character * length}\n"):
                equal_to_exported(exported["llama2"], llama2, text)
                equal_to_exported(exported["llama3"], llama3, text)


def test_special_tokens_of_an_exported_tokenizer(exported, llama2, llama3):
    for tokenizer, library in ((llama2, exported["llama2"]), (llama3, exported["llama3"])):
        added = library.get_added_tokens_decoder()
        assert tokenizer.special.items() <= {token.content: i for i, token in added.items()}.items()
        assert all(token.special for token in added.values())
        assert library.get_vocab_size() == tokenizer.vocab


@few
@given(text=texts)
def test_llama_2_is_equal_to_sentencepiece(llama2, spiece, text):
    equal_to_sentencepiece(llama2, spiece, text)


@few
@given(text=texts)
def test_llama_3_is_equal_to_tiktoken(llama3, meta, text):
    equal_to_tiktoken(llama3, meta, text)


@pytest.mark.slow
@many
@given(text=texts)
def test_llama_2_is_equal_to_sentencepiece_on_10_000_texts(llama2, spiece, text):
    equal_to_sentencepiece(llama2, spiece, text)


@pytest.mark.slow
@many
@given(text=texts)
def test_an_exported_tokenizer_is_equal_to_llamas_on_10_000_texts(exported, llama2, llama3, text):
    equal_to_exported(exported["llama2"], llama2, text)
    equal_to_exported(exported["llama3"], llama3, text)


@pytest.mark.slow
@many
@given(text=texts)
def test_llama_3_is_equal_to_tiktoken_on_10_000_texts(llama3, meta, text):
    equal_to_tiktoken(llama3, meta, text)


@pytest.mark.slow
@many
@given(text=texts)
def test_llama_3_and_its_tokenizer_json_are_equal_to_transformers_on_10_000_texts(llama3, hf, converted, text):
    equal_to_transformers(llama3, hf, converted, text)


def test_a_corpus_is_equal_to_sentencepiece_and_tiktoken(test_data, llama2, llama3, spiece, meta):
    text = (test_data / "tinyshakespeare.txt").read_text()[:200_000]
    documents = re.split(r"\n\n", text)
    for ours, theirs in ((llama2.encode_all, spiece.encode), (llama3.encode_all, meta.encode_ordinary_batch)):
        assert [ids.tolist() for ids in ours(documents)] == theirs(documents)
    assert all(ids.dtype == np.int32 for ids in llama3.encode_all(documents))


@pytest.mark.parametrize("name", ["llama2", "llama3"])
@few
@given(data=st.data())
def test_a_stream_of_any_text_is_that_text(name, llama2, llama3, data):
    tokenizer = {"llama2": llama2, "llama3": llama3}[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab - 1), max_size=12)) if name == "llama3" else []
    ids = tokenizer.encode(data.draw(texts).replace("\u2581", "")) + ids
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)
