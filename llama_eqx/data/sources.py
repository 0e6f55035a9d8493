"""Files of text: how they are found, the pieces they are read in, and the documents in each.

The end of a file's name, in capitals or not, says what is in it. What is said of .jsonl holds for .ndjson, which is another name for it.
"""

import glob
import gzip
import io
import json
import os
import shlex
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_eqx.errors import DataError, first_line, hub_download

TEXT, LINES, PARQUET = ".txt", ".jsonl", ".parquet"
COMPRESSED = (".gz", ".zst")
UNREAD = "cannot read: "
NO_TEXT = "not UTF-8 text"
TALK = "a conversation"
OTHERS = ", but with "
ALSO_LINES = ".ndjson"
IN_FOLDERS = (*(f"{suffix}{pressed}" for suffix in (TEXT, ".md", LINES, ALSO_LINES) for pressed in ("", *COMPRESSED)), PARQUET)


@dataclass(frozen=True)
class Source:
    """A file. `name` is relative to where it was looked for, so it is the same on every machine. `size` is in bytes."""

    name: str
    path: str
    size: int


@dataclass(frozen=True)
class Piece:
    """The part of a source that is read at once: all of it, its lines that begin in the bytes `start` up to `stop`, or these row groups.

    `number` is that of the source. `first` is the number of records before the piece, where it is known without reading them. `weight` is
    about the number of bytes to read.
    """

    number: int
    source: Source
    start: int
    stop: int
    first: int
    weight: int


class Record(NamedTuple):
    """`number` counts from 1: lines from the start of the piece, blank ones included, and rows from the start of the file. It is 0 when the
    whole source is the document.

    A blank line has neither a text nor a problem.
    """

    number: int
    text: str | None
    problem: str = ""


def find(where: str, key: str) -> list[Source]:
    """Returns the files that match, in order: a file, a glob (with ** for nested folders), or all of `IN_FOLDERS` below a folder.

    Raises `DataError` when there are none, with the advice to set `key`.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        root, files = path, [file for file in path.rglob("*") if file.name.lower().endswith(IN_FOLDERS)]
    else:
        # The folder before the first wildcard, so that names do not depend on what else matches.
        root = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        files = [path] if path.is_file() else [Path(file) for file in glob.glob(str(path), recursive=True)]
    if found := sorted(file for file in files if file.is_file()):
        return [Source(file.relative_to(root).as_posix(), str(file), file.stat().st_size) for file in found]
    advice = f"{key}=FOLDER with {LISTED} files, or a glob such as {key}='FOLDER/**/*.txt'"
    raise DataError("nothing matches", where=str(path), next=advice + hub_download(where, "dataset"))


LISTED = ".txt, .md, .jsonl or .parquet"


def pieces(number: int, source: Source, size: int | None, field: str) -> list[Piece]:
    """Cuts a source into pieces of about `size` bytes, or leaves it whole with None. Only .parquet and uncompressed .jsonl can be cut.

    Raises `DataError` for a .parquet file that is not one, or has no text in the column `field`.
    """
    if kind_of(source) == PARQUET:
        return _row_groups(number, source, size, field)
    cut = size if size and kind_of(source) == LINES and not _compression(source) else max(1, source.size)
    starts = range(0, max(1, source.size), cut)
    return [Piece(number, source, start, min(start + cut, source.size), 0, min(cut, source.size - start)) for start in starts]


def records(piece: Piece, field: str, *, skip: bool) -> Iterator[Record]:
    """Yields the documents of a piece: `field` of each line or row, or the whole text. A record that cannot be read has a problem instead.
    With `skip`, a damaged compressed file yields one such record and nothing else.

    Raises `DataError` when the file's size has changed.
    """
    source, number = piece.source, 0
    try:
        if (size := os.stat(source.path).st_size) != source.size:
            raise DataError(
                f"the file has {size} bytes, and had {source.size} a moment ago", where=source.path, next="wait until it is complete"
            )
        if kind_of(source) == PARQUET:
            for number, content in enumerate(_rows(piece, field), piece.first + 1):
                yield _row(number, content, field)
            return
        with _open(source, to_end=skip and kind_of(source) == LINES) as file:
            if kind_of(source) == LINES:
                for number, line in enumerate(_lines(file, piece), 1):
                    yield _line(number, line, field)
            else:
                yield _record(0, file.read())
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        yield _unread(number, error)


def lines(source: Source, *, skip: bool) -> Iterator[Record]:
    """Yields the lines of a file as they are, without blank ones. Where it cannot be read, a record has a problem, as in `records`."""
    number = 0
    try:
        with _open(source, to_end=skip) as file:
            for number, line in enumerate(file, 1):
                record = _record(number, line)
                if record.text is None or record.text.strip():
                    yield record
    except (OSError, EOFError, zlib.error) as error:
        yield _unread(number, error)


def read_text(path: Path) -> str:
    """The text of a file. Raises `DataError` when it cannot be read or is not UTF-8."""
    source = Source(path.name, str(path), 0)
    try:
        record = _record(0, path.read_bytes())
    except OSError as error:
        record = _unread(0, error)
    if record.text is None:
        raise refusal(Piece(0, source, 0, 0, 0, 0), record, "data.path")
    return record.text


def refusal(piece: Piece, record: Record, key: str) -> DataError:
    """The problem of a record as an error for users. `key` names the files."""
    where = f"{piece.source.path}:{_lines_before(piece) + record.number}" if record.number else piece.source.path
    if record.problem.startswith(TALK):
        file = shlex.quote(piece.source.path)
        return DataError(record.problem, where=where, next=f"python -m llama_eqx.train data=sft data.path={file} trains on conversations")
    advice = f"{remedy(record)}, or leave the file out with a glob such as {key}='FOLDER/*.md'"
    others = record.problem.partition(OTHERS)[2]
    return DataError(record.problem, where=where, next=f"{_by_field(others.split(', '))}, or {advice}" if others else advice)


def _by_field(names: Sequence[str]) -> str:
    """What to type for a text that has one of these names."""
    field = f"field={shlex.quote(names[0])}" if len(names) == 1 else f"field=NAME, which is one of {', '.join(names[:10])}"
    return f"python -m llama_eqx.prepare with {field}"


def remedy(record: Record) -> str:
    """What the user can do about the record's problem."""
    if record.problem.startswith(UNREAD):
        return "download or copy this file again"
    return "mend this record, or take it out" if record.number else "convert it to UTF-8"


def kind_of(source: Source) -> str:
    """`LINES`, `PARQUET`, or `TEXT` for anything else."""
    name = plain(source)
    return PARQUET if name.endswith(PARQUET) else LINES if name.endswith((LINES, ALSO_LINES)) else TEXT


def plain(source: Source) -> str:
    """The source's name in lower case, without the suffix of its compression."""
    return source.name.lower().removesuffix(_compression(source))


def _compression(source: Source) -> str:
    """The suffix in `COMPRESSED` that the name ends with, or ""."""
    return next((suffix for suffix in COMPRESSED if source.name.lower().endswith(suffix)), "")


def _open(source: Source, *, to_end: bool) -> Any:
    """Opens a file. `to_end` first reads a compressed file to its end: damage to earlier lines may show only there."""
    compression = _compression(source)
    if to_end and compression:
        with _open(source, to_end=False) as file:
            while file.read(2**20):
                pass
    if compression == ".gz":
        return gzip.open(source.path)
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(source.path, "zstd"), 2**20)
    return open(source.path, "rb")


def _lines(file: Any, piece: Piece) -> Iterator[bytes]:
    if piece.stop - piece.start == piece.source.size:  # not cut; a compressed file is longer than its size says
        yield from file
        return
    file.seek(max(0, piece.start - 1))
    at = piece.start - 1 + len(file.readline()) if piece.start else 0
    while at < piece.stop and (line := file.readline()):
        yield line
        at += len(line)


def _lines_before(piece: Piece) -> int:
    """The number of the file's lines before a piece of it."""
    count, left, last = 0, piece.start, b"\n"
    if kind_of(piece.source) == LINES and piece.start:
        with open(piece.source.path, "rb") as file:
            while left > 0 and (block := file.read(min(2**20, left))):
                count, left, last = count + block.count(b"\n"), left - len(block), block[-1:]
            if last != b"\n":  # the line that is cut belongs to the piece before
                count += 1
    return count


def _line(number: int, line: bytes, field: str) -> Record:
    record = _record(number, line)
    if record.text is None or not record.text.strip():
        return record if record.problem else Record(number, None)
    found = None
    try:
        text = (found := json.loads(record.text))[field]
        text.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if isinstance(found, dict) and isinstance(found.get("messages"), list):
            return Record(number, None, f'{TALK}, without a string "{field}"')
        others = "" if isinstance(found, dict) and field in found else ", ".join(strings_in(found))
        return Record(number, None, f'not a JSON object with a string "{field}"{OTHERS if others else ""}{others}')
    return Record(number, text)


def strings_in(found: Any) -> tuple[str, ...]:
    """The keys of an object that have strings."""
    return tuple(key for key, value in found.items() if isinstance(value, str)) if isinstance(found, dict) else ()


def _record(number: int, content: bytes) -> Record:
    """The record of a file or a line. It may begin with a byte order mark. A NUL means another encoding, or no text."""
    if b"\0" not in content:
        try:
            return Record(number, content.decode("utf-8-sig"))
        except UnicodeDecodeError:
            pass
    return Record(number, None, NO_TEXT)


def _row(number: int, content: bytes | None, field: str) -> Record:
    """The record of a row. As in a line, every character is text, even a byte order mark or a NUL."""
    if content is None:
        return Record(number, None, f"no text in the column {field}")
    try:
        return Record(number, content.decode())
    except UnicodeDecodeError:
        return Record(number, None, NO_TEXT)


def _unread(before: int, error: Exception) -> Record:
    """The record that stands for all after the first `before`."""
    return Record(before + 1 if before else 0, None, f"{UNREAD}{getattr(error, 'strerror', None) or error}")


def _row_groups(number: int, source: Source, size: int | None, field: str) -> list[Piece]:
    import pyarrow

    try:
        with _parquet(source) as file:
            types, metadata = {column.name: column.type for column in file.schema_arrow}, file.metadata
            texts = [name for name, has in types.items() if _is_text(has)]
            if field not in texts:
                what = f"the column {field!r} has {types[field]}, not text" if field in types else f"no column {field!r}"
                raise DataError(what, where=source.path, next=_by_field(texts) if texts else "a file with a column of text")
            column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == field)
            found, start, first, weight, rows = [], 0, 0, 0, 0
            for i in range(metadata.num_row_groups):
                weight += metadata.row_group(i).column(column).total_uncompressed_size
                rows += metadata.row_group(i).num_rows
                if i + 1 == metadata.num_row_groups or (size and weight >= size):
                    found.append(Piece(number, source, start, i + 1, first, weight))
                    start, first, weight, rows = i + 1, first + rows, 0, 0
            return found
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"not a parquet file: {first_line(error)}", where=source.path) from error


def _is_text(has: Any) -> bool:
    import pyarrow

    has = has.value_type if pyarrow.types.is_dictionary(has) else has
    return pyarrow.types.is_string(has) or pyarrow.types.is_large_string(has)


def _rows(piece: Piece, field: str) -> Iterator[bytes | None]:
    import pyarrow

    with _parquet(piece.source) as file:
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[field], use_threads=False):
            column = batch.column(0)
            yield from column.cast(pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary()).to_pylist()


def _parquet(source: Source) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(source.path)
