"""Tokenizers beside a model, and what is said when the file is another or damaged."""

import base64
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama_eqx.data.tokenizer import (
    BytesTokenizer,
    HuggingFaceTokenizerConfig,
    SentencePieceTokenizer,
    SentencePieceTokenizerConfig,
    TiktokenTokenizer,
    TiktokenTokenizerConfig,
    find_tokenizer,
)
from llama_eqx.data.tokenizer.find import options
from llama_eqx.data.tokenizer.huggingface import read_huggingface
from llama_eqx.data.tokenizer.tiktoken import PATTERN
from llama_eqx.errors import DataError
from llama_eqx.generation.text import prompt_tokens

TEXT = "The quick brown fox, aged 1234, jumps over the lazy dog.\n    def f(x):\n\treturn x ** 2  # ok\nÉtude à 你好\n" * 20
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
PAGES = {"a Git LFS pointer": LFS, "a web page": b"\n<!DOCTYPE html>\n<html lang=en>", "an empty file": b" \n"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model of each library: spm.model, ranks.model and, from the latter, a Hugging Face folder hf."""
    from sentencepiece import SentencePieceTrainer
    from tiktoken._educational import bpe_train
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text(TEXT)
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spm"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    ranks = bpe_train(TEXT, 320, PATTERN, visualise=None)
    (folder / "ranks.model").write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()))
    special = list(TiktokenTokenizer((folder / "ranks.model").read_bytes()).special)
    library = TikTokenConverter(str(folder / "ranks.model"), PATTERN, extra_special_tokens=special).converted()
    library.post_processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 320)])
    PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>").save_pretrained(folder / "hf")
    return folder


@pytest.fixture
def hf(files, tmp_path):
    """A copy of the Hugging Face folder, to be changed."""
    return shutil.copytree(files / "hf", tmp_path / "hf")


@pytest.fixture
def build(text):
    """Builds a tokenizer from an option of conf/tokenizer and a path."""

    def build(option, path, chat="llama3_1"):
        config = {
            "sentencepiece": lambda: SentencePieceTokenizerConfig(vocab=320, path=path),
            "tiktoken": lambda: TiktokenTokenizerConfig(path=path, chat=chat),
            "hf": lambda: HuggingFaceTokenizerConfig(path=path, chat=None),
        }[option]()
        return config.build(text(None))

    return build


@pytest.fixture(scope="module")
def ours(files):
    return read_huggingface(files / "hf")


@pytest.fixture(scope="module")
def reference(files):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(files / "hf")
    return lambda: tokenizer  # which hypothesis would print at length


NAMES = ["<|eot_id|>", "<|begin_of_text|>", "<|reserved_special_token_9|>", "<s>", " ", "\n", "fox", "don't"]


@settings(deadline=None, max_examples=200)
@given(text=st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(NAMES)).map("".join))
def test_a_tokenizer_json_is_read_as_transformers_reads_it(ours, reference, text):
    theirs = reference()
    assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("option", "file", "said", "advice"),
    [
        ("sentencepiece", "ranks.model", "a tiktoken file", "tokenizer=tiktoken tokenizer.path={file}"),
        ("tiktoken", "spm.model", "a SentencePiece model", "tokenizer=sentencepiece tokenizer.path={file}"),
        ("sentencepiece", "hf/tokenizer.json", "a JSON file", "tokenizer=hf tokenizer.path=FOLDER"),
        ("tiktoken", "hf/tokenizer.json", "a JSON file", "tokenizer=hf tokenizer.path=FOLDER"),
        ("sentencepiece", "text.txt", "not a SentencePiece model", "another file"),
        ("tiktoken", "text.txt", "not a tiktoken file", "another file"),
        ("sentencepiece", "none", "cannot read: No such file", "tokenizer.path=FILE"),
        ("tiktoken", "none", "cannot read: No such file", "tokenizer.path=FILE"),
        ("hf", "none", "cannot read: No such file", "tokenizer.path=FOLDER"),
        ("tiktoken", "hf", "a folder", "tokenizer=hf tokenizer.path={file}"),
        ("hf", "hf/tokenizer.json", "cannot read", "tokenizer.path={folder}"),
    ],
)
def test_another_file_says_which_option_reads_it(option, file, said, advice, files, build):
    path = files / file
    with pytest.raises(DataError, match=said) as error:
        build(option, str(path))
    assert advice.format(file=path, folder=path.parent) in error.value.next
    assert error.value.where.startswith(str(path))


def test_a_folder_names_the_file_in_it(files, build, tmp_path):
    shutil.copy(files / "ranks.model", tmp_path / "tokenizer.model")
    for option in ("sentencepiece", "tiktoken"):
        with pytest.raises(DataError, match="a folder") as error:
            build(option, str(tmp_path))
        assert error.value.next == f"tokenizer.path={tmp_path / 'tokenizer.model'}"
    with pytest.raises(DataError, match="cannot read") as error:
        build("hf", str(tmp_path))
    assert f"tokenizer.path={tmp_path / 'tokenizer.model'}" in error.value.next


@pytest.mark.parametrize("option", ["sentencepiece", "tiktoken", "hf"])
@pytest.mark.parametrize("said", PAGES)
def test_what_a_failed_download_leaves(option, said, build, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(PAGES[said])
    with pytest.raises(DataError, match=said) as error:
        build(option, str(tmp_path if option == "hf" else file))
    assert error.value.where == str(file)
    assert error.value.next


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-5] + b"!!!! 319\n",
        lambda content: content.replace(b" 300\n", b" 301\n"),
        lambda content: content.replace(b" 300\n", b" -1\n"),
        lambda content: content.replace(b" 300\n", b"\n"),
        lambda content: content[: len(content) // 2],
        lambda content: content.split(b"\n", 1)[1],
        lambda content: b"\n".join(content.split(b"\n")[:200]),
    ],
)
def test_a_damaged_tiktoken_file_is_refused(damage, files, build, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(damage((files / "ranks.model").read_bytes()))
    with pytest.raises(DataError, match="a tiktoken file"):
        build("tiktoken", str(file))


@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: b"{}", lambda c: b"[]", lambda c: c.replace(b'"BPE"', b'"PBE"'), lambda c: b"\xff\xfe"]
)
def test_a_damaged_tokenizer_json_is_refused(damage, hf):
    file = hf / "tokenizer.json"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"a damaged tokenizer\.json") as error:
        find_tokenizer(hf)
    assert error.value.where == str(file)


# Which ids begin and end a text, by the files that lie beside tokenizer.json.
@pytest.mark.parametrize(
    ("generation", "config", "eos", "stop"),
    [
        ({"eos_token_id": [321, 328, 329]}, {"eos_token_id": 5}, 321, (321, 328, 329)),
        ({"eos_token_id": 321}, {}, 321, (321, 328, 329)),
        ({"eos_token_id": [7, 8]}, {}, 7, (7, 8, 328, 329)),
        ({}, {"eos_token_id": [321, 329]}, 321, (321, 329, 328)),
        ({"eos_token_id": None}, {"eos_token_id": None}, 329, (329, 328)),  # tokenizer_config.json's <|eot_id|>
    ],
)
def test_the_ends_of_a_hugging_face_model(generation, config, eos, stop, hf):
    (hf / "generation_config.json").write_text(json.dumps(generation))
    (hf / "config.json").write_text(json.dumps(config))
    tokenizer = find_tokenizer(hf)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop, tokenizer.pad, tokenizer.chat) == (320, eos, stop, 324, "llama3_1")


def test_the_ends_of_a_native_folder(hf):
    """`config.yaml` says which end a text; what ends a document, and so the ids of a corpus, it says only where no other file does."""
    (hf / "config.yaml").write_text("model:\n  tokens: {tokenizer: null, bos: 9, eos: [321, 7], pad: null}\n")
    tokenizer = find_tokenizer(hf)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop) == (320, 329, (329, 321, 7, 328))
    (hf / "tokenizer_config.json").unlink()
    tokenizer = find_tokenizer(hf)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop) == (9, 321, (321, 7, 328, 329))
    (hf / "config.yaml").write_text("model: {tokens: [1, 2]}")
    assert find_tokenizer(hf).eos == 321


@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize("said", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
def test_what_a_text_begins_with(processor, said, hf):
    """BOS or nothing, as transformers reads the folder; BOS where a model is trained on documents that begin with it."""
    if not processor:
        edit(hf / "tokenizer.json", post_processor=None)
    edit(hf / "tokenizer_config.json", **said)
    assert prompt_tokens(find_tokenizer(hf), "fox") == AutoTokenizer.from_pretrained(hf)("fox").input_ids
    trained = read_huggingface(hf)
    trained.save(hf / "run" / "tokenizer")
    assert trained.prefix == find_tokenizer(hf / "run").prefix == find_tokenizer(hf / "run" / "checkpoints" / "3").prefix == (320,)


def edit(file, **settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize("newer", [{}, {"added_tokens_decoder": {}}], ids=["older", "newer"])
def test_the_ends_of_an_older_folder_are_those_of_transformers(newer, hf):
    edit(hf / "tokenizer_config.json", **newer)
    (hf / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|python_tag|>"}, "eos_token": "<|end_of_text|>"}')
    tokenizer, reference = find_tokenizer(hf), AutoTokenizer.from_pretrained(hf)
    assert (tokenizer.bos, tokenizer.eos) == (reference.bos_token_id, reference.eos_token_id) == ((320, 329) if newer else (330, 321))


def test_what_was_saved_is_found_again_by_its_option(files, hf, build, tmp_path):
    """Data that is prepared later, with the tokenizer of a run or of data from before, has the same ids around its documents."""
    edit(hf / "tokenizer_config.json", bos_token="<|python_tag|>", eos_token="<|eom_id|>")
    ranks = TiktokenTokenizer((files / "ranks.model").read_bytes(), chat="llama3")
    for saved in (read_huggingface(hf), SentencePieceTokenizer((files / "spm.model").read_bytes()), ranks):
        saved.save(tmp_path / saved.kind / "tokenizer")
        option, *keys = options(saved, tmp_path / saved.kind).split()
        found = build(option.removeprefix("tokenizer="), **dict(key.removeprefix("tokenizer.").split("=") for key in keys))
        assert (found.fingerprint, found.stop, found.chat) == (saved.fingerprint, saved.stop, saved.chat)
    assert options(BytesTokenizer(), tmp_path) == "tokenizer=bytes"


def test_an_id_of_minus_one_is_none(hf):
    (hf / "tokenizer_config.json").unlink()
    (hf / "config.json").write_text('{"pad_token_id": -1, "eos_token_id": [321, -1]}')
    tokenizer = find_tokenizer(hf)
    assert (tokenizer.pad, tokenizer.stop) == (324, (321, 328, 329))


def test_a_tokenizer_json_alone_has_llamas_ends(hf):
    (hf / "tokenizer_config.json").unlink()
    tokenizer = find_tokenizer(hf)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop) == (320, 321, (321, 328, 329))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"eos_token_id": "x"}', "not an id"),
        ('{"eos_token_id": [[1]]}', "not an id"),
        ('{"eos_token_id": 9999}', "a special id is 9999"),
    ],
)
def test_damaged_files_beside_a_tokenizer_json(content, said, hf):
    (hf / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=said):
        find_tokenizer(hf)


ROTARY = "model: {rotary: {_target_: llama_eqx.model.rotary.%s}}"
GENERATIONS = [
    ("config.json", '{"rope_scaling": {"rope_type": "llama3"}}', "llama3_1"),
    ("config.json", '{"rope_parameters": {"rope_type": "llama3"}}', "llama3_1"),
    ("config.json", '{"rope_parameters": {"rope_type": "default"}}', "llama3"),
    ("config.json", '{"rope_scaling": null}', "llama3"),
    ("config.yaml", ROTARY % "Llama3RotaryConfig", "llama3_1"),
    ("config.yaml", ROTARY % "PlainRotaryConfig", "llama3"),
]


def test_tokenizers_are_found_beside_models(files, tmp_path):
    native, huggingface, meta, older = (tmp_path / name for name in ("run", "hf", "meta", "llama-2-7b"))
    BytesTokenizer().save(native / "tokenizer")
    assert type(find_tokenizer(native)) is BytesTokenizer

    huggingface.mkdir()
    shutil.copy(files / "spm.model", huggingface / "tokenizer.model")
    (huggingface / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    found = find_tokenizer(huggingface)
    assert type(found) is SentencePieceTokenizer
    assert (found.eos, found.stop) == (2, (2, 5))

    meta.mkdir()
    shutil.copy(files / "ranks.model", meta / "tokenizer.model")
    for params, chat in {'{"dim": 4}': "llama3", '{"use_scaled_rope": true}': "llama3_1"}.items():
        (meta / "params.json").write_text(params)
        found = find_tokenizer(meta)
        assert type(found) is TiktokenTokenizer
        assert found.chat == chat

    for i, (file, said, chat) in enumerate(GENERATIONS):
        shutil.copytree(meta, tmp_path / str(i), ignore=shutil.ignore_patterns("params.json"))
        (tmp_path / str(i) / file).write_text(said)
        assert find_tokenizer(tmp_path / str(i)).chat == chat, said

    older.mkdir()
    shutil.copy(files / "spm.model", tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="no tokenizer beside this model"):
        find_tokenizer(older)
    (older / "params.json").write_text("{}")
    assert type(find_tokenizer(older)) is SentencePieceTokenizer
    (tmp_path / "tokenizer.model").write_bytes(LFS)
    with pytest.raises(DataError, match="a Git LFS pointer"):
        find_tokenizer(older)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00 nothing")
    with pytest.raises(DataError, match="not a SentencePiece model") as error:
        find_tokenizer(older)
    assert error.value.where == str(tmp_path / "tokenizer.model")
