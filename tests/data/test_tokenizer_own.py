"""What a tokenizer of a user's own may lack, and what is said of it."""

import io
import pathlib

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers

from llama_eqx.data.dataset import open_data
from llama_eqx.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer
from llama_eqx.data.tokenizer.export import tokenizer_json
from llama_eqx.data.tokenizer.sentencepiece import LLAMA_SETTINGS


def trained(lines, **settings):
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **{**LLAMA_SETTINGS, **settings})
    return SentencePieceTokenizer(model.getvalue())


def few_words():
    library = Tokenizer(models.WordLevel({"[UNK]": 0, "quick": 1, "brown": 2, "fox": 3}, "[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return HuggingFaceTokenizer(library.to_str().encode())


def few_letters():
    return trained(["the quick brown fox jumps"] * 9, vocab_size=60, byte_fallback=False)


@pytest.mark.parametrize("tokenizer", [few_words, few_letters])
@pytest.mark.parametrize(("told", "content"), [(True, "你好 quick fox "), (False, "quick brown fox ")])
def test_text_that_a_tokenizer_loses_is_told(tokenizer, told, content, write, text):
    data = text(write(a_txt=content * 200))
    notes = open_data(data, tokenizer(), seq_len=16, seed=0).notes
    assert [note.split(" of the held-out tokens are id 0, ")[-1].startswith("which stands for") for note in notes] == [True] * told
    assert open_data(data, BytesTokenizer(), seq_len=16, seed=0).notes == []  # every byte has an id


def test_rows_in_which_no_target_counts_lose_nothing(write, text, monkeypatch):
    """As of conversations that are cut before the answer; here they are rows of padding."""
    data = text(write(a_txt="你好 quick fox " * 200))
    kind = type(open_data(data, few_words(), seq_len=16, seed=0).val)
    read = kind.read
    monkeypatch.setattr(kind, "read", lambda self, rows: read(self, np.full_like(rows, -1)))
    assert open_data(data, few_words(), seq_len=16, seed=0).notes == []


@pytest.mark.parametrize("said", [{"model_type": "unigram"}, {"user_defined_symbols": ["<sep>"]}], ids=["unigram", "defined"])
def test_no_tokenizer_json_is_written_with_other_ids(said):
    lines = pathlib.Path(__file__).read_text().split("\n")
    assert tokenizer_json(trained(lines, vocab_size=450, **said)) is None
    assert tokenizer_json(trained(lines, vocab_size=450, split_digits=False)) is not None
