import dataclasses
import gzip
import json
import pathlib
import sysconfig

import pytest
import yaml

from llama_eqx import load_config
from llama_eqx.config import load
from llama_eqx.data.cache import cache_dir, publish
from llama_eqx.data.dataset import held_out
from llama_eqx.data.tokenizer import BytesTokenizer
from llama_eqx.errors import ConfigError, DataError, StorageError

CONF = pathlib.Path(__file__).resolve().parents[2] / "conf"


def config(name):
    return load(yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text()))


def documents(data, split):
    return [part.document for part in data.parts() if part.split == split]


def joined(data, split):
    return "".join(document.text for document in documents(data, split))


def names(data, split):
    return {document.name for document in documents(data, split)}


def numbered(write, count):
    return write(**{f"{i:03}_txt": f"document {i}\n" for i in range(count)})


def test_a_text_to_evaluate_on_is_evaluated_on_whole_however_long_a_row(write):
    folder = write(a_txt="a" * 100, b_txt="b" * 3)
    data = dataclasses.replace(config("test"), path=str(folder))
    found = [held_out(data, BytesTokenizer(), seq_len=length, key="eval_data.abc")[0] for length in (7, 16, 500)]
    assert [(rows.targets, rows.bytes) for rows in found] == [(101 + 4, 103)] * 3  # the end of each, but not its beginning


@pytest.mark.parametrize("rows", ["windows", "documents"])
def test_an_evaluation_set_without_a_row_is_named_with_what_helps(write, rows):
    data = dataclasses.replace(config("test"), path=str(write(a_txt="abc")), rows=rows)
    with pytest.raises(DataError, match=r"eval_data\.abc: val has 5 tokens, a row needs 17") as error:
        held_out(data, BytesTokenizer(), seq_len=16, key="eval_data.abc")
    assert error.value.where.endswith("a.txt")
    assert error.value.next.startswith("eval_data.abc.rows=packed, which pads rows, train.seq_len=4 or less, or ")
    with pytest.raises(DataError, match=r"eval_data\.abc: the component prose: nothing matches") as error:
        held_out(config_of_mixture("nowhere"), BytesTokenizer(), seq_len=16, key="eval_data.abc")
    assert "else eval_data.abc.components.prose.path=FOLDER with" in error.value.next


def config_of_mixture(path):
    return load_config(
        "data=mixture", "~data@data.components.code", "~data.weights.code", "data.weights.prose=1", f"data.components.prose.path={path}"
    ).data


@pytest.mark.parametrize("name", ["shakespeare", "stdlib", "text"])
def test_every_corpus_loads(name):
    data = config(name)
    assert data.holdout == "validation"


@pytest.mark.parametrize("change", [{"validation_fraction": 0.0}, {"validation_fraction": 1.1}, {"holdout": "test"}])
def test_a_value_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(config("stdlib"), **change)


def test_stdlib_is_large_ordered_and_free_of_tests():
    corpus = list(config("stdlib").documents())
    found = [document.name for document in corpus]
    assert sum(len(document.text) for document in corpus) > 5e6
    assert len(set(found)) == len(found) > 400
    assert found == sorted(found, key=lambda name: [(part != name.split("/")[-1], part) for part in name.split("/")])
    assert {"os.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(found)
    parts = {part for name in found for part in name.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert max(len(document.text) for document in corpus) <= 2**20


def test_stdlib_skips_what_is_not_text_and_says_when_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for name, content in {"latin.py": b"\xe9", "zero.py": b"a\0", "empty.py": b"", "big.py": b"x" * (2**20 + 1), "a.so": b"text"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no sources") as error:
        list(config("stdlib").documents())
    assert "data=text data.path=FOLDER" in error.value.next
    (tmp_path / "good.py").write_bytes(b"good")
    assert [document.name for document in config("stdlib").documents()] == ["good.py"]


def test_many_documents_are_split_whole_by_name_and_stay_where_they_are(write, text):
    folder = numbered(write, 400)
    train, val = names(text(folder), "train"), names(text(folder), "val")
    assert len(train | val) == 400
    assert not train & val
    assert 20 < len(val) < 60
    for path in list(folder.iterdir())[::3]:
        path.unlink()
    assert names(text(folder), "train") < train
    assert names(text(folder), "val") < val


def test_the_split_does_not_depend_on_where_the_corpus_is(write, text, tmp_path):
    folder = numbered(write, 200)
    val, identity = names(text(folder), "val"), text(folder).identity()
    moved = folder.rename(tmp_path / "elsewhere")
    assert names(text(moved), "val") == val
    assert text(moved).identity() == identity


@pytest.mark.parametrize("count", [1, 3, 400])
def test_tuning_leaves_the_validation_text_alone(write, text, count):
    folder = write(**{f"{i:03}_txt": "".join(f"{i}.{j} " for j in range(1000 // count)) for i in range(count)})
    final, tuning = text(folder), text(folder, holdout="tuning")
    train, val = documents(final, "train"), documents(final, "val")
    assert val
    if count == 400:
        assert names(tuning, "train") | names(tuning, "val") == names(final, "train")
        assert 10 < len(names(tuning, "val")) < 60
    else:
        for before, *now in zip(train, documents(tuning, "train"), documents(tuning, "val"), strict=True):
            assert "".join(document.text for document in now) == before.text
            assert abs(len(now[1].text) / len(before.text) - 0.1) < 0.01
    assert tuning.identity() != final.identity()


def test_few_documents_are_each_cut_at_the_end(write, text):
    folder = write(a_txt="0123456789" * 10, b_md="abcdefghij" * 10)
    assert joined(text(folder), "train") == "0123456789" * 9 + "abcdefghij" * 9
    assert joined(text(folder), "val") == "0123456789abcdefghij"


def test_identity_changes_with_names_texts_and_split(write, text):
    folder = write(a_txt="ab", b_txt="c")
    seen = {text(folder).identity(), text(folder, fraction=0.2).identity()}
    write(a_txt="a", b_txt="bc")
    seen.add(text(folder).identity())
    (folder / "a.txt").rename(folder / "0.txt")
    seen.add(text(folder).identity())
    assert len(seen) == 4
    assert text(folder).identity() in seen
    write(**{"0_txt": "1b.txt2"})
    (folder / "b.txt").unlink()
    joined = text(folder).identity()
    write(**{"0_txt": "1", "b_txt": "2"})
    assert text(folder).identity() != joined


def test_a_folder_a_glob_and_a_file_name_documents_relative_to_the_corpus(write, text):
    folder = write(a_txt="A", deep__b_md="B", deep__c_jsonl='{"text": "C"}\n\n{"n": 1, "text": "D"}\r\n', deep__d_py="E", empty_txt="")
    found = {document.name: document.text for document in text(folder).documents()}
    assert found == {"a.txt": "A", "deep/b.md": "B", "deep/c.jsonl:1": "C", "deep/c.jsonl:3": "D"}
    assert [document.name for document in text(folder / "**" / "*.[mt]*").documents()] == ["a.txt", "deep/b.md"]
    assert [document.name for document in text(folder / "deep" / "*.py").documents()] == ["d.py"]
    assert [document.name for document in text(folder / "deep" / "b.md").documents()] == ["b.md"]


def test_text_arrives_unchanged_but_for_a_byte_order_mark(write, text):
    folder = write(
        a_txt="\ufeffé\r\n\t x\u2028y ", b_jsonl=b"\xef\xbb\xbf" + json.dumps({"text": "\0\u2028 é"}, ensure_ascii=False).encode()
    )
    assert [document.text for document in text(folder).documents()] == ["é\r\n\t x\u2028y ", "\0\u2028 é"]


@pytest.mark.parametrize(
    "line", ["{", "[1]", '"text"', "1", "null", "{}", '{"text": 1}', '{"text": null}', r'{"text": "\ud800"}', "[" * 100_000]
)
def test_a_bad_json_line_is_named(write, text, line):
    folder = write(a_jsonl='{"text": "good"}\n\n' + line)
    with pytest.raises(DataError, match='string "text"') as error:
        list(text(folder).documents())
    assert error.value.where == f"{folder}/a.jsonl:3"


@pytest.mark.parametrize("content", [b"a\0b", b"\xff\xfea\0", b"caf\xe9"])
@pytest.mark.parametrize("name", ["a_txt", "a_jsonl"])
def test_a_binary_file_is_named(write, text, name, content):
    folder = write(**{name: content})
    with pytest.raises(DataError, match="not UTF-8") as error:
        list(text(folder).documents())
    assert error.value.where.startswith(f"{folder}/{name.replace('_', '.')}")
    assert "data.path=" in error.value.next


def test_of_a_damaged_compressed_file_no_line_is_left_when_it_is_skipped(write, text):
    packed = gzip.compress(b'{"text": "a"}\n')
    folder = write(a_jsonl_gz=packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:], b_txt="b")  # of the checksum
    data = dataclasses.replace(text(folder), on_error="skip")
    assert ([document.text for document in data.documents()], data.skipped()) == (["b"], [f"{folder}/a.jsonl.gz"])


def test_no_path_no_file_and_no_text_say_what_to_type(write, text, tmp_path):
    for missing in (None, ""):
        with pytest.raises(ConfigError, match=r"data=text needs data\.path=FOLDER_OR_GLOB"):
            list(text(missing).documents())
    for path in (tmp_path / "nothing", tmp_path / "*.md", write(a_txt="", b_jsonl="\n"), write(c_py="x") / "*.rst"):
        with pytest.raises(DataError, match=r"no text here|nothing matches") as error:
            list(text(path).documents())
        assert error.value.where == str(path)
        assert "data.path=FOLDER" in error.value.next


def test_shakespeare_is_split_as_by_nanogpt(test_data):
    data = dataclasses.replace(config("shakespeare"), path=str(test_data / "tinyshakespeare.txt"))
    whole = (test_data / "tinyshakespeare.txt").read_text()
    train, val = joined(data, "train"), joined(data, "val")
    assert (len(train), len(val)) == (1_003_854, 111_540)
    assert train + val == whole


def test_shakespeare_is_downloaded_once_and_checked(test_data, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes((test_data / "tinyshakespeare.txt").read_bytes())
    data = dataclasses.replace(config("shakespeare"), url=copy.as_uri())
    before = data.identity()
    copy.unlink()
    assert data.identity() == before
    assert data.identity() == dataclasses.replace(data, path=str(test_data / "tinyshakespeare.txt")).identity()


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_download_says_what_to_do(tmp_path, cache, there):
    other = tmp_path / "other.txt"
    if there:
        other.write_text("another text")
    with pytest.raises(DataError, match="is not the expected one" if there else "download failed") as error:
        list(dataclasses.replace(config("shakespeare"), url=other.as_uri()).documents())
    assert f"download {other.as_uri()} yourself and pass data.path=FILE" in error.value.next
    assert not list((cache / "downloads").iterdir())


def test_the_cache_is_where_the_environment_says_or_anywhere(tmp_path, monkeypatch):
    home, xdg, blocked = tmp_path / "home", tmp_path / "xdg", tmp_path / "file" / "cache"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(xdg))
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("LLAMA_EQX_CACHE")
    assert cache_dir() == xdg / "llama_eqx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == home / ".cache" / "llama_eqx"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for name in ("HOME", "LLAMA_EQX_CACHE"):
        monkeypatch.setenv(name, str(blocked))
    assert cache_dir().parent == tmp_path / "tmp"
    shared = cache_dir()
    shared.chmod(0o777)  # as somebody else would leave it who has made it first, and filled it
    assert cache_dir() != shared
    shared.rename(tmp_path / "elsewhere")
    shared.symlink_to(tmp_path / "elsewhere")
    assert cache_dir() != shared
    shared.unlink()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert cache_dir().parent == tmp_path / "tmp"


def test_what_is_published_is_whole_and_the_first_wins(tmp_path):
    folder = tmp_path / "made"

    def broken(temporary):
        (temporary / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(StorageError, match="disk full") as error:
        publish(folder, broken)
    assert "LLAMA_EQX_CACHE" in error.value.next

    def racing(temporary):
        (temporary / "x").write_text("mine")
        publish(folder, lambda other: (other / "x").write_text("theirs"))

    publish(folder, racing)
    publish(folder, broken)
    assert (folder / "x").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["made"]
