"""Prepared data: its documents and tokens are those of the input, and what cannot be read or makes no sense is refused by name."""

import dataclasses
import gzip
import hashlib
import json
import pathlib
import random

import pytest

from llama_eqx import load_config
from llama_eqx.data import assembly, units
from llama_eqx.data.encoding import tokenize
from llama_eqx.data.prepare import prepare
from llama_eqx.data.shards import open_dataset
from llama_eqx.data.tokenizer import BytesTokenizer, CharsTokenizer, TokenizerConfig, load_tokenizer
from llama_eqx.errors import ConfigError, DataError


def config(*overrides):
    return load_config("tokenizer=bytes", "prepare.workers=1", "validation_fraction=0.2", *overrides, name="prepare")


def opened(folder):
    return open_dataset(pathlib.Path(folder), remedy="")


def texts(split):
    return [bytes(split.document(i)[1:-1].tolist()).decode() for i in range(split.documents)]


def held_out(text, fraction=0.2):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "little") / 2**64 >= 1 - fraction


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize(("unit", "shard"), [(10**9, 10**9), (400, 10**9), (300, 1000), (400, 1)])
def test_a_dataset_has_every_document_in_order(corpus, tmp_path, monkeypatch, dedup, unit, shard):
    folder, expected = corpus
    monkeypatch.setattr(assembly, "BLOCK", 50)
    monkeypatch.setattr(units, "CHUNK", 200)
    done = prepare(config(f"input={folder}", f"output={tmp_path}/out", f"dedup={dedup}", f"unit_bytes={unit}", f"shard_tokens={shard}"))
    if dedup:
        first = dict(reversed([(text, (source, text)) for source, text in expected]))
        unique = [pair for pair in expected if first[pair[1]] == pair]
        assert done.duplicates == len(expected) - len(unique) > 10
        expected = unique
    data = opened(tmp_path / "out")
    for split, wanted in ((data.train, False), (data.val, True)):
        pairs = [(source, text) for source, text in expected if held_out(text) == wanted]
        assert texts(split) == [text for _, text in pairs]
        assert [split.source(i) for i in range(split.documents)] == [source for source, _ in pairs]
        assert split.read(0, split.tokens).tolist() == [id for _, text in pairs for id in (256, *text.encode(), 257)]
        assert split.bytes == sum(len(text.encode()) for _, text in pairs)
        assert done.counts[split.name]["documents"] == len(pairs)
    assert (len(data.train.shards) > 3) == (shard < 10**9)
    assert not (tmp_path / "out" / "partial").exists()
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["sources"] == [{"name": path.name, "size": path.stat().st_size} for path in sorted(folder.iterdir())]
    assert index["tokenizer"] == load_tokenizer(tmp_path / "out" / "tokenizer").fingerprint == BytesTokenizer().fingerprint


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos_are_there_when_asked(tmp_path, bos, eos):
    (tmp_path / "a.jsonl").write_text('{"body": "ab"}\n{"body": ""}\n{"body": "c"}\n')
    settings = ["field=body", "validation_fraction=0", f"bos={bos}", f"eos={eos}"]
    done = prepare(config(f"input={tmp_path}/a.jsonl", f"output={tmp_path}/out", *settings))
    data = opened(tmp_path / "out")
    around = [256] * bos, [257] * eos
    assert [data.train.document(i).tolist() for i in range(2)] == [[*around[0], *text, *around[1]] for text in (b"ab", b"c")]
    assert (data.train.documents, data.val.documents, done.empty) == (2, 0, 1)


def test_a_bad_line_ends_all_by_name_or_is_counted(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(300)]
    lines[123] = '{"text": "cut'
    lines[200] = '{"texts": "x"}'
    lines[201] = '{"text": "\\ud800"}'
    (tmp_path / "a.NDJSON").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    overrides = [f"input={tmp_path}/*.*", f"output={tmp_path}/out", "unit_bytes=500"]
    for workers in (1, 2):
        with pytest.raises(DataError, match="not a JSON object") as error:
            prepare(config(*overrides, f"prepare.workers={workers}"))
        assert error.value.where == f"{tmp_path}/a.NDJSON:124"
        assert "on_error=skip" in error.value.next
    whole = gzip.compress(b'{"text": "\xe4\xbd\xa0"}\n')
    (tmp_path / "c.jsonl.gz").write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])  # of the checksum
    done = prepare(config(*overrides[:1], f"output={tmp_path}/skipped", "unit_bytes=500", "on_error=skip"))
    assert done.refused == 5
    assert [name.split(": ")[0] for name in done.named] == ["a.NDJSON:124", "a.NDJSON:201", "a.NDJSON:202", "b.txt", "c.jsonl.gz"]
    prepare(config(*overrides[:1], f"output={tmp_path}/chars", "on_error=skip", "tokenizer=chars"))
    assert "\u4f60" not in load_tokenizer(tmp_path / "chars" / "tokenizer").characters
    data = opened(tmp_path / "skipped")
    assert data.train.documents + data.val.documents == 297
    for split in (data.train, data.val):
        for i, text in enumerate(texts(split)):
            assert split.source(i) == f"a.NDJSON:{int(text.split()[1]) + 1}"


def test_text_that_the_tokenizer_does_not_know_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "az"}\n{"text": "b"}\n')

    class Fixed(TokenizerConfig):
        def build(self, data):
            return CharsTokenizer(b"ab")

    chosen = dataclasses.replace(config(f"input={tmp_path}/a.jsonl", f"output={tmp_path}/out", "validation_fraction=0"), tokenizer=Fixed())
    with pytest.raises(DataError, match="'z'") as error:
        prepare(chosen)
    assert error.value.where == f"{tmp_path}/a.jsonl:2"
    (tmp_path / "out" / "partial" / "units.json").unlink()
    assert prepare(dataclasses.replace(chosen, on_error="skip")).refused == 1
    assert opened(tmp_path / "out").train.read(0, 3).tolist() == [0, 1, 1]


def test_the_held_out_texts_are_the_same_in_whatever_files(tmp_path):
    found = [f"text {i}" for i in range(400)]
    for name, order in (("a", found), ("b", found[::-1])):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order[i::4]))
        prepare(config(f"input={tmp_path / name}", f"output={tmp_path}/out-{name}"))
    first, second = (set(texts(opened(tmp_path / f"out-{name}").val)) for name in "ab")
    assert first == second
    assert 50 < len(first) < 110


@pytest.mark.parametrize(
    ("content", "fraction", "split"),
    [
        (["ab"], 0.01, "val"),
        (["ab"], 0.99, "train"),
        ([""], 0.0, "train"),
        (["ab", "cd", "ef"], 1e-9, "val"),
        (["ab", "cd", "ef"], 0.999, "train"),
    ],
)
def test_an_empty_split_is_an_error_that_another_fraction_mends(tmp_path, content, fraction, split):
    for i, text in enumerate(content):
        (tmp_path / f"{i}.txt").write_text(text)
    overrides = [f"input={tmp_path}/*.txt", f"output={tmp_path}/out"]
    with pytest.raises(DataError, match=f"the {split} split is empty") as error:
        prepare(config(*overrides, f"validation_fraction={fraction}"))
    advice = [word.strip(",") for word in error.value.next.split() if word.startswith("validation_fraction=")]
    assert len(advice) == any(content)
    if len(content) == 1 and advice:
        assert error.value.next.startswith(f"python -m llama_eqx.train data=text data.path={tmp_path}/0.txt, which holds out the end of")
    if advice:
        documents = {split: count["documents"] for split, count in prepare(config(*overrides, *advice)).counts.items()}
        assert (sum(documents.values()), documents["val"] > 0) == (len(content), len(content) > 1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["input=null"], "input=GLOB"),
        (["input=null", "output=null"], "output=FOLDER"),
        (["validation_fraction=1"], "validation_fraction"),
        (["unit_bytes=0"], "unit_bytes"),
        (["prepare.workers=0"], "prepare.workers"),
        (["on_error=skp"], "did you mean skip"),
        (["prepare.engine=rai"], "one of: local, ray"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides, said):
    with pytest.raises(ConfigError) as error:
        config("input=a", "output=b", *overrides)
    assert said in str(error.value)


def test_input_that_is_not_there_or_unclear_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing matches") as error:
        prepare(config(f"input={tmp_path}/*.txt", f"output={tmp_path}/out"))
    assert "input=" in error.value.next
    (tmp_path / "a.JSON.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"a \.json file could be anything"):
        prepare(config(f"input={tmp_path}/*", f"output={tmp_path}/out"))
    assert not (tmp_path / "out").exists()


def test_a_run_reads_it_with_the_tokenizer_it_came_with(corpus, tmp_path):
    prepare(config(f"input={corpus[0]}", f"output={tmp_path}/out"))
    run = load_config("data=prepared", f"data.path={tmp_path}/out")
    tokenizer = run.tokenizer.build(run.data)
    assert tokenizer.fingerprint == BytesTokenizer().fingerprint
    assert tokenize(run.data, tokenizer) == opened(tmp_path / "out")
    other = load_config("data=prepared", f"data.path={tmp_path}/out", "tokenizer=chars")
    with pytest.raises(ConfigError, match="no text"):
        other.tokenizer.build(other.data)
    with pytest.raises(DataError, match="prepared with the tokenizer"):
        tokenize(run.data, CharsTokenizer(b"ab"))
    with pytest.raises(ConfigError, match="only data=prepared") as error:  # as +data@eval_data.x=prepared asks for it
        run.tokenizer.build(load_config("data=stdlib").data)
    assert "tokenizer.path=FOLDER/tokenizer/tokenizer.model" in error.value.next
    with pytest.raises(DataError, match="no prepared data"):
        run.tokenizer.build(dataclasses.replace(run.data, path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"needs data\.path"):
        run.tokenizer.build(dataclasses.replace(run.data, path=None))


def test_a_tokenizer_is_trained_on_the_training_text(tmp_path):
    draw = random.Random(0)
    lines = ["".join(draw.choice("abcdefg ") for _ in range(100)) for _ in range(200)]
    marked = [line + ("Q" * 50 if held_out(line + "Q" * 50) else "") for line in lines]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in marked))
    prepare(config(f"input={tmp_path}/a.jsonl", f"output={tmp_path}/out", "tokenizer=sentencepiece", "tokenizer.vocab=300"))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer.vocab == 300
    assert len(tokenizer.encode("QQQQ")) > len(tokenizer.encode("abab"))
    data = opened(tmp_path / "out")
    assert sorted(tokenizer.decode(split.document(i)) for split in (data.train, data.val) for i in range(split.documents)) == sorted(marked)
