"""Whatever stands in the place of a file that is read back, one sentence names it and says what to type, or nothing is lost with it."""

import errno
import json
import os
import pathlib
import random
import shutil

import pytest
import yaml

from llama_eqx import load_config
from llama_eqx.checkpoint.manifest import MANIFEST, read_manifest
from llama_eqx.checkpoint.native import CONFIG, write_config
from llama_eqx.data import prepare as module
from llama_eqx.data.cache import publish
from llama_eqx.data.prepare import prepare
from llama_eqx.data.shards import open_dataset
from llama_eqx.data.tokenizer import BytesTokenizer, load_tokenizer
from llama_eqx.data.tokenizer.base import MARK
from llama_eqx.errors import DataError, UserError
from llama_eqx.files import write_json
from llama_eqx.studies.registration import load_registration, tuned, write_tuned
from llama_eqx.studies.runs import STUDY, read_kept, read_run
from llama_eqx.tracking.jsonl import Jsonl, read_metrics
from llama_eqx.tracking.starts import read_starts
from llama_eqx.tracking.wandb import _id
from llama_eqx.training.replay import replay

ROOT = pathlib.Path(__file__).parents[1]
ROW, START = {"step": 4, "val/loss": 3.0}, {"step": 0, "code": {"llama_eqx": "c1"}, "parameters": 7}
TORN = {
    "nothing": b"",
    "random bytes": random.Random(0).randbytes(300),
    "zeros": bytes(100),
    "null": b"null",
    "a list": b"[]",
    "another object": b'{"x": {}}',
    "a number": b"3",
    "a string": b'"x"',
    "nested": b"[" * 200_000,
    "digits": b"1" * 5000,
    "a folder": None,
}


def put(path: pathlib.Path, content: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with something of everything; the settings of a run that cannot be built, and a registration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments" / "ffn").mkdir(parents=True)
    (tmp_path / "replay").mkdir()
    shutil.copy(ROOT / "experiments/ffn/prereg.yaml", tmp_path / "experiments/ffn")
    write_config({"seed": 0, "train": {"steps": 4}}, tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    BytesTokenizer().save(tmp_path / "tokenizer")
    return tmp_path


READERS = {
    CONFIG: read_run,
    STUDY: read_run,
    "provenance.jsonl": read_run,
    f"tokenizer/{MARK}": lambda place: load_tokenizer(place / "tokenizer"),
    MANIFEST: read_manifest,
    "index.json": lambda place: open_dataset(place, remedy="make it anew"),
    "replay/step-3.json": lambda place: replay(load_config("bundle=replay/step-3.json", name="replay")),
    "experiments/ffn/prereg.yaml": lambda place: load_registration("ffn"),
    "experiments/ffn/tuned.yaml": lambda place: tuned("ffn", "1m", "swiglu"),
    "run.jsonl.gz": lambda place: read_kept(place / "run.jsonl.gz"),
}
# What is no damage: a file of lines that has none, an object from which nothing is read.
FINE = {("provenance.jsonl", "nothing"), ("provenance.jsonl", "another object"), (STUDY, "another object")}


@pytest.mark.parametrize("how", TORN)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_such_file_is_named(name, how, place):
    put(place / name, TORN[how])
    if (name, how) in FINE:
        READERS[name](place)
        return
    with pytest.raises(UserError) as error:
        READERS[name](place)
    assert pathlib.Path(name).parent.name in error.value.where
    assert pathlib.Path(name).name in str(error.value) or error.value.where.endswith("tokenizer")
    assert error.value.next or name == MANIFEST  # whose checkpoint is set aside


@pytest.mark.parametrize("value", [{}, [], "x", None, True], ids=repr)
@pytest.mark.parametrize("key", ["step", "val/loss"])
def test_a_value_that_is_no_number_is_no_metric(tmp_path, key, value):
    for rows in ([ROW, {**ROW, key: value}], [{**ROW, key: value}, ROW]):  # the last line may be torn, but this one is whole
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for read in (read_metrics, lambda path: Jsonl(path, 4)):
            with pytest.raises(DataError, match=f"metrics.jsonl:{rows.index(ROW) * -1 + 2}\nnext: remove the line"):
                read(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "wrong", [{"step": "x"}, {"code": []}, {"code": {"llama_eqx": 3}}, {"parameters": "x"}, {"eval_data": 3}], ids=repr
)
def test_a_start_of_another_shape_is_none(tmp_path, wrong):
    path = tmp_path / "provenance.jsonl"
    path.write_text(f"{json.dumps({**START, **wrong})}\n{json.dumps(START)}\n")
    assert read_starts(path, lenient=True) == [START]
    with pytest.raises(DataError, match=r"no record of a start\nwhere: .*provenance.jsonl:1\nnext: remove the line"):
        read_starts(path)


@pytest.mark.parametrize(
    ("rates", "said"), [("1m: 3", "AttributeError"), ("1m: {swiglu: x}", "ValueError"), ("1m: {swiglu: .nan}", "swiglu: nan")]
)
def test_what_is_no_learning_rate_is_none(place, rates, said):
    (place / "experiments/ffn/tuned.yaml").write_text(rates)
    for read in (lambda: tuned("ffn", "1m", "swiglu"), lambda: write_tuned("ffn", "1m", {})):
        with pytest.raises(UserError, match=f"these are no learning rates: .*{said}"):
            read()
    assert (place / "experiments/ffn/tuned.yaml").read_text() == rates


def test_a_contrast_whose_weights_have_no_sum_is_refused(place):
    path = place / "experiments/ffn/prereg.yaml"
    known = yaml.safe_load(path.read_text())
    name, contrast = next(iter(known["contrasts"].items()))
    path.write_text(yaml.safe_dump({**known, "contrasts": {name: {**contrast, next(iter(contrast)): float("nan")}}}))
    with pytest.raises(UserError, match="the weights sum to nan, not 0"):
        load_registration("ffn")


def test_an_id_that_is_none_is_made_anew(tmp_path):
    for how in ("nothing", "random bytes", "zeros", "a list"):
        (tmp_path / "wandb_id").write_bytes(TORN[how] or b"")
        assert _id(tmp_path / "wandb_id") == _id(tmp_path / "wandb_id")


WRITERS = {
    "config.yaml": lambda place: write_config({"seed": 1}, place),
    "experiments/ffn/tuned.yaml": lambda place: write_tuned("ffn", "1m", {"swiglu": 0.1}),
    f"tokenizer/{MARK}": lambda place: BytesTokenizer().save(place / "tokenizer"),
    "study.json": lambda place: write_json(place / "study.json", {"parameters": 1}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_leaves_what_was_there(name, place, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    WRITERS[name](place)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](place)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_what_is_published_is_on_the_disk_first(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: [synced.add(os.fstat(file).st_ino), fsync(file)])
    folder = publish(tmp_path / "cached", lambda folder: (folder / "tokenizer.model").touch())
    assert (folder / "tokenizer.model").stat().st_ino in synced


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """Prepared data of which the index is yet to be written, and how the same command is given for a copy of it."""
    folder = tmp_path_factory.mktemp("unfinished")
    (folder / "text").mkdir()
    for i in range(6):
        (folder / "text" / f"{i}.txt").write_text(f"text {i} " * 50)

    def again(output: pathlib.Path):
        settings = ["tokenizer=bytes", "prepare.workers=1", "validation_fraction=0.3", "dedup=true", "unit_bytes=900"]
        return prepare(load_config(f"input={folder / 'text'}", f"output={output}", *settings, name="prepare"))

    def stop(*_, **__):
        raise KeyboardInterrupt

    for name, broken in {"encoded": "plan", "written": "write_index"}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, broken, stop)
            with pytest.raises(KeyboardInterrupt):
                again(folder / name)
    return folder, again


@pytest.mark.parametrize("how", ["nothing", "random bytes", "null", "another object"])
@pytest.mark.parametrize(
    ("stage", "name"),
    [("encoded", f"unit-000000.{ending}") for ending in ("json", "npy", "ids")]
    + [("written", name) for name in ("group-00000.json", "shards.json", "units.json")],
)
def test_unfinished_work_that_is_damaged_is_named(stage, name, how, unfinished, tmp_path):
    folder, again = unfinished
    shutil.copytree(folder / stage, output := tmp_path / "output")
    put(output / "partial" / name, TORN[how])
    with pytest.raises(DataError) as error:
        again(output)
    assert name in str(error.value) or "unfinished work here, and not this one" in error.value.what
    assert f"rm -r {output / 'partial'}" in error.value.next or "delete this folder" in error.value.next
    if how == "null":
        shutil.rmtree(output / "partial")
        assert sum(counts["documents"] for counts in again(output).counts.values()) == 6
