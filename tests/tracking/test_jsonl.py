"""The record of a run survives kills, resumes and numbers that JSON cannot say."""

import json
import math
import os

import numpy as np
import pytest

from llama_eqx.errors import DataError, StorageError
from llama_eqx.tracking.jsonl import Jsonl, read_metrics


def written(path, steps, start=0):
    jsonl = Jsonl(path, start)
    for step in steps:
        jsonl.log(step, {"train/loss": 10.0 - step})
    jsonl.close()
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def steps_in(path):
    return [record["step"] for record in read_metrics(path)]


def test_each_line_is_on_disk_at_once(path):
    jsonl = Jsonl(path, 0)
    jsonl.log(1, {"train/loss": 0.1, "optim/lr": np.float32(0.5), "count": 3})
    assert read_metrics(path) == [{"step": 1, "train/loss": 0.1, "optim/lr": 0.5, "count": 3.0}]
    jsonl.log(2, {"val/loss": 1e-300})
    assert path.read_text().count("\n") == 2
    jsonl.close()


def test_the_record_is_brought_to_the_disk(path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: [synced.append(os.fstat(file)), fsync(file)])
    jsonl = Jsonl(path, 0)
    jsonl.log(1, {"train/loss": 0.1})
    assert not synced  # a step does not wait for the disk
    jsonl.sync()
    jsonl.close()
    assert [(file.st_ino, file.st_size) for file in synced] == [(path.stat().st_ino, path.stat().st_size)]


def test_what_is_not_finite_is_valid_json(path):
    jsonl = Jsonl(path, 0)
    jsonl.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    jsonl.close()

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(path.read_text(), parse_constant=refuse) == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    record = read_metrics(path)[0]
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_a_resumed_run_drops_what_it_will_make_again(path):
    written(path, range(1, 8))
    written(path, [6, 7, 8], start=5)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(path.parent.iterdir()) == [path]


def test_a_run_from_the_beginning_drops_all(path):
    written(path, range(4))
    written(path, [0, 1])
    assert steps_in(path) == [0, 1]


def test_keeps_every_bit_of_the_kept(path):
    loss = math.nextafter(2.0, 3.0)
    jsonl = Jsonl(path, 0)
    jsonl.log(1, {"train/loss": loss, "nan": math.nan})
    jsonl.close()
    before = path.read_bytes()
    written(path, [], start=1)
    assert path.read_bytes() == before
    assert read_metrics(path)[0]["train/loss"] == loss


@pytest.mark.parametrize("tail", [b'{"step": 4, "train/lo', b'{"step": 4}', b'{"step": 4, "tra\n', b"\0\0\0\0", b"\xff\xfe\n", b"3\n"])
def test_a_torn_tail_is_left_out_and_then_cut_off(path, tail):
    written(path, [1, 2, 3])
    with path.open("ab") as file:
        file.write(tail)
    assert steps_in(path) == [1, 2, 3]
    written(path, [4], start=3)
    assert steps_in(path) == [1, 2, 3, 4]


def test_damage_before_the_end_is_an_error(path):
    written(path, [1, 2])
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        read_metrics(path)


def test_no_file(path):
    with pytest.raises(DataError, match="no metrics there"):
        read_metrics(path)
    with pytest.raises(StorageError, match="cannot be written"):
        Jsonl(path / "deeper" / "metrics.jsonl", 0)


def test_a_full_disk_is_a_storage_error(path):
    path.symlink_to("/dev/full")
    jsonl = Jsonl.__new__(Jsonl)
    jsonl._path, jsonl._file = path, path.open("a")
    with pytest.raises(StorageError, match="No space left"):
        jsonl.log(1, {"train/loss": 1.0})
    with pytest.raises(StorageError):
        jsonl.sync()
    with pytest.raises(StorageError):
        jsonl.close()
