"""Work that is divided, interrupted or done again gives the same bytes, and is never mixed with other work."""

import errno
import fcntl
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from llama_eqx import load_config
from llama_eqx import prepare as verb
from llama_eqx.data import prepare as module
from llama_eqx.data.prepare import prepare
from llama_eqx.data.shards import open_dataset
from llama_eqx.data.units import run_unit
from llama_eqx.errors import ConfigError, DataError, UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def config(*overrides):
    return load_config("tokenizer=bytes", "prepare.workers=1", "validation_fraction=0.2", *overrides, name="prepare")


def contents(folder):
    """Every file of a dataset."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()}


def opened(folder):
    return open_dataset(pathlib.Path(folder), remedy="")


def test_any_number_of_workers_gives_the_same_bytes(corpus, tmp_path):
    found = []
    for workers in (1, 2, 3):
        output = tmp_path / str(workers)
        prepare(
            config(
                f"input={corpus[0]}", f"output={output}", "unit_bytes=900", "shard_tokens=1500", f"prepare.workers={workers}", "dedup=true"
            )
        )
        found.append(contents(output))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 10


def test_what_is_interrupted_anywhere_goes_on_to_the_same_bytes(corpus, tmp_path, monkeypatch):
    overrides = [f"input={corpus[0]}", "unit_bytes=1000", "shard_tokens=1500", "dedup=true"]
    prepare(config(*overrides, f"output={tmp_path}/whole"))
    replace, draw, interruptions = os.replace, random.Random(0), 0

    def interrupted(*names):
        if draw.random() < 0.2:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(os, "replace", interrupted)
    while True:
        try:
            prepare(config(*overrides, f"output={tmp_path}/out"))
        except KeyboardInterrupt:
            interruptions += 1
            continue
        break
    assert interruptions > 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def started(*overrides):
    """The verb, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "llama_eqx.prepare", *overrides], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )


def finished(run):
    run.communicate()
    return run.returncode


@pytest.fixture
def long(tmp_path):
    """Overrides for work of some seconds, and a function that waits until some of its units are done."""
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": f"{i} some words " * 20}) + "\n" for i in range(4000)))

    def wait(run, output):
        while not list(output.glob("partial/unit-*.json")):
            assert run.poll() is None, run.communicate()
            time.sleep(0.001)

    return [f"input={tmp_path}/long.jsonl", "tokenizer=bytes", "unit_bytes=10_000", "shard_tokens=300_000"], wait


def test_a_killed_run_leaves_no_process_and_goes_on_to_the_same_bytes(long, tmp_path):
    overrides, wait = long
    whole, output = started(*overrides, f"output={tmp_path}/whole", "prepare.workers=1"), tmp_path / "out"
    killed = started(*overrides, f"output={output}", "prepare.workers=2")
    wait(killed, output)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (output / "index.json").exists()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(killed.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers outlived their parent")
    assert list(output.glob("partial/unit-*.json"))
    result = started(*overrides, f"output={output}", "prepare.workers=2")
    assert finished(result) == 0
    assert finished(whole) == 0
    assert contents(output) == contents(tmp_path / "whole")


def test_a_killed_worker_is_said_and_the_same_command_continues(long, tmp_path):
    overrides, wait = long
    run = started(*overrides, f"output={tmp_path}/out", "prepare.workers=2")
    wait(run, tmp_path / "out")
    children = pathlib.Path(f"/proc/{run.pid}/task/{run.pid}/children")
    if not children.exists():
        run.kill()
        pytest.skip("needs /proc")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    said = run.communicate()[1]
    assert run.returncode == UserError.code
    assert "a worker was killed" in said
    assert "the same command continues" in said
    prepare(config(*overrides, "validation_fraction=0.01", f"output={tmp_path}/out"))
    assert opened(tmp_path / "out").train.documents > 3900


def test_what_is_done_is_not_done_again_and_never_for_something_else(corpus, tmp_path, monkeypatch, capsys):
    folder, _ = corpus
    overrides = [f"input={folder}", f"output={tmp_path}/out"]
    first = prepare(config(*overrides))
    before = contents(tmp_path / "out")
    monkeypatch.setattr(module, "run_unit", lambda *_: pytest.fail("encoded again"))
    again = prepare(config(*overrides))
    assert (again.counts, again.touched) == (first.counts, [])
    for change in ("dedup=true", "eos=false", "tokenizer=chars", "validation_fraction=0.1"):
        with pytest.raises(DataError, match="there is a dataset here") as error:
            prepare(config(*overrides, change))
        assert change.split("=")[0] in error.value.what
    content = (folder / "a1.txt").read_bytes()
    (folder / "a1.txt").write_bytes(b"?" * len(content))
    os.utime(folder / "a1.txt", (0, 0))
    assert prepare(config(*overrides)).touched == ["a1.txt"]
    verb.main(config(*overrides), overrides)
    assert "warning     1 files were written to or copied after they were encoded: a1.txt\n" in capsys.readouterr().out
    times = before["modified.json"]
    for damaged in (times[:-5], b"\xff", b"1", b"[1, 2]"):
        (tmp_path / "out" / "modified.json").write_bytes(damaged)
        assert prepare(config(*overrides)).touched == []
    (tmp_path / "out" / "modified.json").write_bytes(times)
    (folder / "a0.txt").write_text("something else")
    with pytest.raises(DataError, match=r"sources: 7 -> 7 files, 1 of them .*a0\.txt"):
        prepare(config(*overrides))
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "train-00000.ids.npy").write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        prepare(config(*overrides))


def test_unfinished_work_is_not_mixed_with_other(corpus, tmp_path, monkeypatch):
    folder, _ = corpus
    overrides = [f"input={folder}", f"output={tmp_path}/out"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "plan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config(*overrides))
    with pytest.raises(DataError, match=r"unfinished work here, and not this one:\n +bos: True -> False"):
        prepare(config(*overrides, "bos=false"))
    os.utime(folder / "a1.txt", (0, 0))
    with pytest.raises(DataError, match=r"modified: .*a1\.txt"):
        prepare(config(*overrides))


def test_what_ended_with_an_error_is_continued_or_replaced(tmp_path, monkeypatch):
    """What the errors say to type works: another field, `on_error=skip`, which does only what is left, a mended file, another fraction."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.jsonl").write_text("".join(f'{{"body": "{i} {j} {"x" * 90}"}}\n' for j in range(9)))
    (tmp_path / "in" / "4.txt").write_bytes(b"caf\xe9")
    overrides, done = [f"input={tmp_path}/in", f"output={tmp_path}/out", "unit_bytes=900"], []
    for change, said in ("field=text", 'string "text"'), ("field=body", "not UTF-8"), ("field=body bos=false", "not UTF-8"):
        with pytest.raises(DataError, match=said):
            prepare(config(*overrides, *change.split()))
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_unit", lambda task, unit: done.append(unit.number) or run_unit(task, unit))
        assert prepare(config(*overrides, "field=body", "bos=false", "on_error=skip")).refused == 1
    assert done == [4]
    (tmp_path / "in" / "4.txt").write_text("café")
    few = [f"input={tmp_path}/in/4.txt", f"output={tmp_path}/few", "tokenizer=sentencepiece", "tokenizer.vocab=264"]
    with pytest.raises(DataError, match="val split is empty"):
        prepare(config(*few, "validation_fraction=1e-9"))
    assert prepare(config(*few, "validation_fraction=0")).refused == 0


@pytest.mark.parametrize(("name", "same"), [("a.ndjson", False), ("a.JSONL", False), ("a.jsonl", True), ("a.txt", True)])
def test_what_was_prepared_while_an_ending_was_text_is_another(tmp_path, monkeypatch, name, same):
    (tmp_path / name).write_text('{"text": "To be."}\n{"text": "Not to be."}\n')
    again = config(f"input={tmp_path / name}", f"output={tmp_path}/out", "validation_fraction=0")
    with monkeypatch.context() as before:
        before.setattr(module, "_read_as", lambda source: {})
        prepare(again)
    if same:
        prepare(again)
    else:
        with pytest.raises(DataError, match="there is a dataset here, and not this one"):
            prepare(again)


def test_two_do_not_write_into_one_folder(corpus, tmp_path, monkeypatch):
    overrides, other = [f"input={corpus[0]}", f"output={tmp_path}/out"], [f"input={corpus[0]}", f"output={tmp_path}/out", "bos=false"]
    plan, modified = module.plan, module._modified

    def second(*arguments):
        for again in (overrides, other):
            with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is writing here") as error:
                prepare(config(*again))
            assert error.value.where == str(tmp_path / "out")
            assert "output=ANOTHER" in error.value.next
        return plan(*arguments)

    monkeypatch.setattr(module, "plan", second)
    prepare(config(*overrides))
    monkeypatch.setattr(module, "plan", plan)
    prepare(config(f"input={corpus[0]}", f"output={tmp_path}/alone"))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")

    def first(sources):
        """Finishes after the other has looked whether there is a dataset."""
        monkeypatch.setattr(module, "_modified", modified)
        prepare(config(*overrides[:1], f"output={tmp_path}/between"))
        return modified(sources)

    monkeypatch.setattr(module, "_modified", first)
    with pytest.raises(DataError, match=r"there is a dataset here, and not this one:\n +bos: True -> False"):
        prepare(config(*other[:1], f"output={tmp_path}/between", "bos=false"))
    assert contents(tmp_path / "between") == contents(tmp_path / "alone")


def test_where_there_are_no_locks_it_is_prepared_all_the_same(corpus, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert prepare(config(f"input={corpus[0]}", f"output={tmp_path}/out")).shards
