import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_eqx.data.sources import Piece, find, pieces, records, refusal
from llama_eqx.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def pack(content, ending):
    if ending == ".gz":
        return gzip.compress(content)
    if ending == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as file:
            file.write(content)
        return sink.getvalue().to_pybytes()
    return content


def read(path, size=None, field="text", skip=False):
    [source] = find(str(path), "input")
    return [list(records(piece, field, skip=skip)) for piece in pieces(0, source, size, field)]


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from(["", " ", "?", '{"text": "a"}', '{"text": "été\\n"}']), max_size=12),
    last=st.booleans(),
    size=st.integers(1, 60),
)
def test_lines_are_the_same_however_a_file_is_cut(tmp_path, lines, last, size):
    content = "".join(line + "\n" for line in lines)[: None if last else -1].encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    [whole], parts = read(tmp_path / "a.jsonl"), read(tmp_path / "a.jsonl", size)
    assert [record.number for record in whole] == list(range(1, content.count(b"\n") + 1 + bool(content and not content.endswith(b"\n"))))
    joined, before = [], 0
    for part in parts:
        joined += [record._replace(number=before + record.number) for record in part]
        before += len(part)
    assert joined == whole
    [source] = find(str(tmp_path / "a.jsonl"), "input")
    for piece, part in zip(pieces(0, source, size, "text"), parts, strict=True):
        for record in part:
            if record.problem:
                line = int(refusal(piece, record, "input").where.split(":")[-1])
                assert content.split(b"\n")[line - 1] == b"?"


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("copies", [1, 2])
def test_what_is_compressed_reads_the_same(tmp_path, ending, copies):
    lines = "".join(json.dumps({"text": f"{i} é"}) + "\n" for i in range(1000)).encode()
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(lines, ending) * copies)  # files one after another are a file
    [found] = read(tmp_path / f"a.jsonl{ending}")
    assert [record.text for record in found] == [f"{i} é" for i in range(1000)] * copies
    assert [record.number for record in found] == list(range(1, 1000 * copies + 1))
    (tmp_path / f"b.md{ending}").write_bytes(pack(b"\xef\xbb\xbfabc\r\n", ending))
    assert read(tmp_path / f"b.md{ending}") == [[(0, "abc\r\n", "")]]


@pytest.mark.parametrize("name", ["a.ndjson", "a.JSONL", "a.JSONL.GZ", "a.NDJson.zst"])
def test_lines_are_known_by_any_of_their_names(tmp_path, name):
    content = b'{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / name).write_bytes(pack(content, f".{name.lower().split('.')[-1]}"))
    parts = read(tmp_path / name, 14)
    assert [record.text for part in parts for record in part] == ["a", "b"]
    assert len(parts) == (2 if name in ("a.ndjson", "a.JSONL") else 1)  # what is compressed is not cut


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_what_is_cut_off_or_not_compressed_is_a_problem(tmp_path, ending):
    whole = pack(b"".join(b'{"text": "%d"}\n' % (i**9) for i in range(30_000)), ending)
    broken = [whole[:-5], whole[: len(whole) // 2], b"not compressed at all"]
    if ending == ".gz":
        broken.append(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])  # another checksum: a line may be another, and nobody knows which
    for content in broken:
        (tmp_path / f"a.jsonl{ending}").write_bytes(content)
        [[record]] = read(tmp_path / f"a.jsonl{ending}", skip=True)
        assert (record.number, record.text) == (0, None)
        assert "cannot read" in record.problem
        *before, last = read(tmp_path / f"a.jsonl{ending}")[0]  # where it ends a run, its end is not looked at first
        assert last == (len(before) + 1 if before else 0, None, record.problem)
        assert all(record.text for record in before)
        assert len(before) > 10_000 or content is not broken[0]
        [source] = find(str(tmp_path), "input")
        for problem in (record, last):
            error = refusal(pieces(0, source, None, "text")[0], problem, "input")
            assert error.next == "download or copy this file again, or leave the file out with a glob such as input='FOLDER/*.md'"


def test_rows_of_parquet_are_read_by_group(tmp_path):
    table = pyarrow.table({"id": range(10), "text": [*map(str, range(8)), None, ""]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    for size, counts in ((None, [10]), (1, [3, 3, 3, 1])):
        parts = read(tmp_path / "a.parquet", size)
        assert [len(part) for part in parts] == counts
        found = [record for part in parts for record in part]
        assert [record.number for record in found] == list(range(1, 11))
        assert [record.text for record in found] == [*map(str, range(8)), None, ""]
        assert "no text in the column text" in found[8].problem
    wide = pyarrow.table({"body": pyarrow.array(["é"], pyarrow.large_string())})
    parquet.write_table(wide, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", field="body") == [[(1, "é", "")]]


def test_text_is_the_same_in_a_row_and_in_a_line(tmp_path):
    texts = ["\ufeffabc", "abc", "a\0b", "\ufeff", "\0"]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=i % 2 > 0) + "\n" for i, text in enumerate(texts)))
    [rows], [lines] = read(tmp_path / "a.parquet"), read(tmp_path / "a.jsonl")
    assert rows == lines
    assert [record.text for record in rows] == texts
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, *pyarrow.array([b"caf\xe9"]).buffers()[1:]])
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [[(1, None, "not UTF-8 text")]]


def test_a_parquet_file_without_the_column_is_named(tmp_path):
    parquet.write_table(pyarrow.table({"texts": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text'") as error:
        read(tmp_path / "a.parquet")
    assert error.value.where == str(tmp_path / "a.parquet")
    assert error.value.next == "python -m llama_eqx.prepare with field=texts"
    with pytest.raises(DataError, match="int64, not text"):
        read(tmp_path / "a.parquet", field="n")
    repeated = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": repeated}), tmp_path / "c.parquet")
    assert [record.text for record in read(tmp_path / "c.parquet")[0]] == ["a", "b", "a"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match="not a parquet file"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ({"id": 1, "body": "a"}, "python -m llama_eqx.prepare with field=body, or mend"),
        ({"url": "b", "body": "a"}, "python -m llama_eqx.prepare with field=NAME, which is one of url, body, or mend"),
        ({"text": 3, "body": "a"}, "mend"),
        (3, "mend"),
    ],
    ids=str,
)
def test_a_line_with_another_key_says_how_it_is_read(tmp_path, line, advice):
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    [source] = find(str(tmp_path), "data.path")
    [piece] = pieces(0, source, None, "text")
    [record] = records(piece, "text", skip=False)
    assert refusal(piece, record, "data.path").next.startswith(advice)


def test_a_file_that_grew_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    [source] = find(str(tmp_path / "a.txt"), "input")
    [piece] = pieces(0, source, None, "text")
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match="3 bytes"):
        list(records(piece, "text", skip=False))


def test_a_folder_gives_what_can_be_read_in_order_and_a_glob_what_matches(tmp_path):
    for name in ("b/a.txt", "a.md", "b.jsonl.gz", "c.parquet", "d.txt.zst", "e.py", "f.json", "g.txt.bz2", "h.NDJSON.GZ", "i.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    known = ["a.md", "b/a.txt", "b.jsonl.gz", "c.parquet", "d.txt.zst", "h.NDJSON.GZ", "i.TXT"]
    assert [source.name for source in find(str(tmp_path), "input")] == known
    assert [source.name for source in find(f"{tmp_path}/**/*.[pt]*", "input")] == ["b/a.txt", "c.parquet", "d.txt.zst", "e.py", "g.txt.bz2"]
    with pytest.raises(DataError, match="nothing matches") as error:
        find(f"{tmp_path}/*.none", "input")
    assert "input=FOLDER" in error.value.next


def test_a_file_that_cannot_be_opened_is_a_problem(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    [source] = find(str(tmp_path / "a.txt"), "input")
    (tmp_path / "a.txt").unlink()
    [record] = records(Piece(0, source, 0, 2, 0, 2), "text", skip=False)
    assert "No such file" in record.problem
