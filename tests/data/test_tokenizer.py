import base64
import dataclasses
import json
import pathlib

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_eqx.config import load
from llama_eqx.data.tokenizer import (
    BytesTokenizer,
    CharsTokenizer,
    CharsTokenizerConfig,
    HuggingFaceTokenizer,
    SentencePieceTokenizerConfig,
    TiktokenTokenizer,
    load_tokenizer,
)
from llama_eqx.data.tokenizer.huggingface import read_huggingface
from llama_eqx.data.tokenizer.tiktoken import PATTERN
from llama_eqx.errors import ConfigError, DataError

CONF = pathlib.Path(__file__).resolve().parents[2] / "conf"
POEM = "The quick brown fox, aged 1234, jumps over the lazy dog.\n    def f(x):\n\treturn x ** 2  # ok\nÉtude à 你好\n" * 20
NAMES = ["<s>", "</s>", "<|eot_id|>", "<|begin_of_text|>", "<think>", "<mine>"]
texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")) | st.sampled_from([*NAMES, " ", "\n", "don't", "123"])
).map("".join)


def trained(vocab):
    return SentencePieceTokenizerConfig(vocab=vocab, path=None)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):

    folder = tmp_path_factory.mktemp("poem")
    (folder / "poem.txt").write_text(POEM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_EQX_CACHE", str(folder / "cache"))
        data = yaml.safe_load((CONF / "data" / "text.yaml").read_text())
        return trained(320).build(load({**data, "path": str(folder / "poem.txt")}))


@pytest.fixture(scope="module")
def tiktoken():
    """A file like Llama 3's, of 320 ranks."""
    from tiktoken._educational import bpe_train

    ranks = bpe_train(POEM, 320, PATTERN, visualise=None)
    return TiktokenTokenizer(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()))


@pytest.fixture(scope="module")
def hf(tiktoken, tmp_path_factory):
    """The same as transformers writes it, with two tokens more: one is called special and the other is not."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = tmp_path_factory.mktemp("hf")
    (folder / "tokenizer.model").write_bytes(tiktoken.ranks)
    library = TikTokenConverter(str(folder / "tokenizer.model"), PATTERN, extra_special_tokens=list(tiktoken.special)).converted()
    library.add_tokens(["<think>"])
    library.add_special_tokens(["<mine>"])
    PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>").save_pretrained(folder)
    return read_huggingface(folder)


@pytest.fixture
def tokenizer(request, sentencepiece, tiktoken, hf):
    own = {"bytes": BytesTokenizer(), "chars": CharsTokenizer(POEM.encode())}
    return {"sentencepiece": sentencepiece, "tiktoken": tiktoken, "hf": hf, **own}[request.param]


KINDS = ["sentencepiece", "tiktoken", "hf", "bytes", "chars"]
every = pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
lossless = pytest.mark.parametrize("tokenizer", KINDS[:-1], indirect=True)
relaxed = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", sorted({path.stem for path in (CONF / "tokenizer").glob("*.yaml")} - {"prepared"}))
def test_every_option_builds_from_text(name, write, text, tmp_path, request):
    tree = yaml.safe_load((CONF / "tokenizer" / f"{name}.yaml").read_text())
    if name in ("tiktoken", "hf"):
        with pytest.raises(ConfigError, match=f"tokenizer={name} needs a f"):
            load(tree)
        request.getfixturevalue(name).save(tmp_path)
        tree["path"] = str(tmp_path / "tokenizer.model" if name == "tiktoken" else tmp_path)
    config = load(tree)
    if name == "sentencepiece":
        config = dataclasses.replace(config, vocab=320)
    assert config.build(text(write(a_txt=POEM))).encode("fox")


@lossless
@relaxed
@given(text=texts)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab for i in ids)
    assert not set(tokenizer.special.values()) & set(ids)
    assert "".join(tokenizer.stream(ids)) == text


@relaxed
@given(text=st.text(sorted(set(POEM))))
def test_any_text_of_the_corpus_characters_comes_back(text):
    tokenizer = CharsTokenizer(POEM.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@every
def test_many_texts_are_encoded_as_one_by_one(tokenizer):
    texts = [*POEM.split("\n"), "", " ", "\n"]
    assert [ids.tolist() for ids in tokenizer.encode_all(texts)] == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_all([]) == []
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@every
def test_what_was_saved_is_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert type(loaded) is type(tokenizer)
    for name in ("vocab", "bos", "eos", "stop", "pad", "special", "chat", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode(POEM) == tokenizer.encode(POEM)


@every
def test_a_damaged_or_missing_tokenizer_is_named(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no tokenizer here") as error:
        load_tokenizer(tmp_path)
    assert error.value.where == str(tmp_path)
    tokenizer.save(tmp_path)
    file = tmp_path / tokenizer.file
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="sha256") as error:
        load_tokenizer(tmp_path)
    assert error.value.where == str(file)
    for content in ("", "[]", '{"kind": "other"}', json.dumps({"kind": tokenizer.kind})):
        (tmp_path / "tokenizer_kind.json").write_text(content)
        with pytest.raises(DataError, match="no tokenizer here"):
            load_tokenizer(tmp_path)


@every
def test_an_id_outside_the_vocabulary_is_refused(tokenizer):
    tokenizer.decode([tokenizer.vocab - 1])
    for wrong in (-1, tokenizer.vocab):
        with pytest.raises(DataError, match=f"id {wrong} is not in this tokenizer's vocabulary of {tokenizer.vocab}"):
            tokenizer.decode([0, wrong])


@every
def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("ab\udce9")


def test_fingerprints_differ(sentencepiece, tiktoken, hf):
    tokenizers = [sentencepiece, tiktoken, hf, BytesTokenizer(), CharsTokenizer(b"ab"), CharsTokenizer(b"abc")]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 6


def test_a_fingerprint_is_of_the_ids_of_documents(tiktoken, hf):
    assert TiktokenTokenizer(tiktoken.ranks, chat="llama3").fingerprint == tiktoken.fingerprint
    other = HuggingFaceTokenizer(hf.definition, bos=hf.bos, eos=hf.eos, stop=[hf.eos, 5], chat="llama3", ordinary=True)
    assert other.fingerprint == hf.fingerprint
    other.mark(bos=hf.bos, eos=5)
    assert other.fingerprint != hf.fingerprint


@lossless
def test_special_ids_come_by_name_when_asked(tokenizer):
    assert tokenizer.special
    for name, i in tokenizer.special.items():
        assert tokenizer.encode(f"ab{name}{name}c", special=True) == [*tokenizer.encode("ab"), i, i, *tokenizer.encode("c")]
        assert i not in tokenizer.encode(f"ab{name}{name}c")
    assert tokenizer.encode("ab", special=True) == tokenizer.encode("ab")
    assert tokenizer.encode("", special=True) == []
    marks = [i for i in (tokenizer.bos, tokenizer.eos, tokenizer.pad) if i is not None]
    assert {*marks, *tokenizer.stop} <= set(tokenizer.special.values())
    assert tokenizer.eos in tokenizer.stop


@lossless
def test_special_ids_have_no_text(tokenizer):
    a, b = tokenizer.encode("a"), tokenizer.encode(" b")
    silent = [i for name, i in tokenizer.special.items() if name != "<think>"]
    assert tokenizer.decode([*silent, *a, *silent, *b]) == tokenizer.decode([*a, *b])
    assert "".join(tokenizer.stream([*silent, *a, *silent, *b])) == tokenizer.decode([*a, *b])


@lossless
def test_a_stream_never_breaks_a_character(tokenizer):
    text = "naïve 你好 \U0001f469\u200d\U0001f467 \U0001f469龘龘 end"
    ids = tokenizer.encode(text)
    assert [part for part in tokenizer.stream(ids) if "\ufffd" in part] == []
    for n in range(len(ids)):
        parts = list(tokenizer.stream(ids[:n]))
        assert "".join(parts) == tokenizer.decode(ids[:n])
        assert all("\ufffd" not in part for part in parts[:-1])  # the last may be what has no end yet


def test_a_stream_comes_as_the_ids_do(tiktoken):
    seen = []

    def ids():
        for i in tiktoken.encode("The fox 你 jumps"):
            seen.append(i)
            yield i

    for text in tiktoken.stream(ids()):
        assert tiktoken.decode(seen).endswith(text)


def test_tokens_that_are_added_but_not_special_are_text(hf, tmp_path):
    """As they are to transformers. A tokenizer that was saved when they were not keeps its ids, and so does a run's."""
    from transformers import AutoTokenizer

    text = "a<think>b<mine><|eot_id|></think>"
    assert hf.decode(hf.encode(text, special=True)) == "a<think>b</think>"
    hf.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert hf.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    think = hf.library.token_to_id("<think>")
    assert think in hf.encode(text) == load_tokenizer(tmp_path).encode(text) == read_huggingface(tmp_path).encode(text)

    older = HuggingFaceTokenizer(hf.definition, bos=hf.bos, eos=hf.eos)
    older.save(tmp_path)
    assert older.fingerprint != hf.fingerprint
    assert older.encode(text) == load_tokenizer(tmp_path).encode(text) == read_huggingface(tmp_path).encode(text)
    assert think not in older.encode(text)
    assert older.decode(older.encode(text, special=True)) == "a<think>b</think>"


def test_marks_are_special_whatever_the_file_says(hf):
    tree = json.loads(hf.definition)
    for token in tree["added_tokens"]:
        token["special"] = False
    found = HuggingFaceTokenizer(json.dumps(tree).encode(), ordinary=True, eos=hf.library.token_to_id("<mine>"))
    text = "a<think>b<mine><|begin_of_text|>"
    assert found.encode(text) == hf.encode(text)
    assert found.decode(found.encode(text, special=True)) == "a<think>b"


def test_texts_of_a_hugging_face_folder_are_neither_cut_nor_filled_up(hf):
    tree = json.loads(hf.definition)
    tree["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tree["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    assert HuggingFaceTokenizer(json.dumps(tree).encode()).encode(POEM) == hf.encode(POEM)


def test_long_runs_of_white_space_are_encoded(tiktoken):
    text = "a" + " " * 1_100_000 + "b"
    assert tiktoken.decode(tiktoken.encode(text)) == text


def test_bytes_are_utf_8_and_two_more():
    tokenizer = BytesTokenizer()
    assert (tokenizer.vocab, tokenizer.bos, tokenizer.eos) == (258, 256, 257)
    assert tokenizer.encode("é\0") == [0xC3, 0xA9, 0]
    assert tokenizer.decode([256, 0xC3, 0xA9, 0xC3, 257]) == "é\ufffd"


def test_chars_of_shakespeare_are_65(test_data, text):
    tokenizer = CharsTokenizerConfig().build(text(test_data / "tinyshakespeare.txt"))
    assert (tokenizer.vocab, tokenizer.bos, tokenizer.eos) == (65, None, None)
    assert tokenizer.encode("\n !z") == [0, 1, 2, 64]


def test_chars_include_the_held_out_text(write, text):
    assert CharsTokenizerConfig().build(text(write(a_txt="a" * 99 + "b"))).vocab == 2


@pytest.mark.parametrize("unknown", ["é", "\0", "~", "\U0010ffff"])
def test_an_unknown_character_is_named(unknown):
    with pytest.raises(DataError, match=f"U\\+{ord(unknown):04X}") as error:
        CharsTokenizer(b"xyz").encode(f"x{unknown}y")
    assert "tokenizer=bytes" in error.value.next


def test_the_sentencepiece_model_has_llamas_layout(sentencepiece):
    assert (sentencepiece.vocab, sentencepiece.bos, sentencepiece.eos) == (320, 1, 2)
    assert [sentencepiece.pieces.id_to_piece(i) for i in (0, 1, 2, 3, 13, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x0A>", "<0xFF>"]
    assert sentencepiece.encode("\n")[-1] == 13
    assert len(sentencepiece.encode("11")) == 1 + 2 - sentencepiece.pieces.id_to_piece(sentencepiece.encode("11")[0]).startswith("▁1")


def test_training_reads_the_training_text_alone_and_once(write, text, cache, monkeypatch):
    folder = write(a_txt=POEM + "QQQQ" * (len(POEM) // 36))  # what is held out is all of one letter
    first = trained(320).build(text(folder))
    pieces = "".join(first.pieces.id_to_piece(i) for i in range(259, 320))
    assert "Q" not in pieces
    assert "o" in pieces
    monkeypatch.setattr("sentencepiece.SentencePieceTrainer.train", lambda *_, **__: pytest.fail("trained again"))
    assert trained(320).build(text(folder)).fingerprint == first.fingerprint


def test_other_text_trains_another_model(write, text):
    first = trained(320).build(text(write(a_txt=POEM)))
    assert trained(320).build(text(write(a_txt=POEM.replace("fox", "cat")))).fingerprint != first.fingerprint


def test_training_is_deterministic(write, text, cache, monkeypatch):
    folder = write(a_txt=POEM)
    first = trained(320).build(text(folder))
    monkeypatch.setenv("LLAMA_EQX_CACHE", f"{cache}-2")
    assert trained(320).build(text(folder)).fingerprint == first.fingerprint


def test_lines_of_any_length_are_trained_on(write, text):
    tokenizer = trained(300).build(text(write(a_txt="a " * 5000 + "quick brown fox " * 1000)))
    assert len(tokenizer.encode("quick brown fox")) == 3


@pytest.mark.parametrize(("vocab", "content"), [(2048, "some words that are few"), (100, POEM), (300, "\n")])
def test_a_vocabulary_that_does_not_fit_the_text_says_what_would(write, text, vocab, content):
    data = text(write(a_txt=content * 2))
    with pytest.raises(DataError, match=f"of {vocab} pieces") as error:
        trained(vocab).build(data)
    assert "tokenizer=bytes" in error.value.next
    if content != "\n":
        limit = int(error.value.next.split("tokenizer.vocab=")[1].split()[0])
        assert trained(limit).build(data).vocab == limit


def test_a_size_below_one_is_refused():
    with pytest.raises(ConfigError):
        trained(0)


def test_llama_2s_own_tokenizer(test_data, text):
    tokenizer = SentencePieceTokenizerConfig(vocab=2048, path=str(test_data / "llama2_tokenizer.model")).build(text(None))
    assert (tokenizer.vocab, tokenizer.bos, tokenizer.eos) == (32_000, 1, 2)
    ids = [15043, 3186, 29892, 29871, 30919, 31076, 29871, 921]
    assert tokenizer.encode("Hello world, 你好  x") == ids
    assert tokenizer.decode([1, *ids, 2]) == "Hello world, 你好  x"


def test_a_trained_model_has_the_settings_of_llama_2s(test_data, sentencepiece):
    from sentencepiece import sentencepiece_model_pb2

    def settings_of(content):
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        names = ["model_type", "byte_fallback", "split_digits", "allow_whitespace_only_pieces", "character_coverage", "unk_surface"]
        names += ["unk_id", "bos_id", "eos_id", "pad_id"]
        norm = model.normalizer_spec
        return [getattr(model.trainer_spec, name) for name in names], (norm.name, norm.add_dummy_prefix, norm.remove_extra_whitespaces)

    assert settings_of(sentencepiece.model) == settings_of((test_data / "llama2_tokenizer.model").read_bytes())
