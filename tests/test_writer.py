"""A run directory has one writer, whoever else comes, and a dead one is no obstacle."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from llama_eqx import writer
from llama_eqx.errors import ConfigError, StorageError
from llama_eqx.writer import LOCK, held

ROOT = pathlib.Path(__file__).parents[1]
HOLDER = """
import sys, time
from llama_eqx import writer
from llama_eqx.errors import UserError
writer.BEAT = 0.05
try:
    with writer.held(sys.argv[1]):
        print("holds", flush=True)
        sys.stdin.read()
except UserError as error:
    print("refused", flush=True)
    sys.exit(error.code)
"""


def start(folder) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


@contextlib.contextmanager
def another(folder):
    """A process that holds the run directory."""
    process = start(folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def elsewhere(monkeypatch):
    """This process on another machine, which the locks of the first do not reach."""

    def no_locks(file, _):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(writer.fcntl, "flock", no_locks)
    monkeypatch.setattr(writer, "machine", lambda: "another")


def test_a_second_one_is_refused_and_told_of_the_first(tmp_path):
    with another(tmp_path) as holder, pytest.raises(ConfigError) as error, held(tmp_path):
        pass
    assert f"process {holder.pid} on " in error.value.what
    assert error.value.code == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_one_is_no_obstacle(tmp_path, number):
    with another(tmp_path) as holder:
        holder.send_signal(number)
        holder.wait()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid
        with held(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    with held(tmp_path):  # it ended in order, and is none either
        pass


def test_one_that_is_stopped_is_not_dead(tmp_path):
    with another(tmp_path) as holder:
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(ConfigError), held(tmp_path):
            pass


def test_a_directory_that_is_moved_meanwhile(tmp_path):
    with another(tmp_path / "run") as holder:
        (tmp_path / "run").rename(tmp_path / "moved")
        assert select.select([holder.stderr], [], [], 60)[0]
        assert holder.stderr.readline().startswith(f"warning: {tmp_path / 'run'} was moved or removed while this run writes there")
        with held(tmp_path / "run"):  # then that place has a writer of its own
            assert holder.wait(60) == 2


def test_of_many_at_once_one_wins(tmp_path):
    started = [start(tmp_path) for _ in range(6)]
    said = [process.stdout.readline().strip() for process in started]
    for process in started:
        process.communicate("")
    assert sorted(said) == ["holds", *["refused"] * 5]
    assert sorted(process.returncode for process in started) == [0, *[2] * 5]


def test_one_on_another_machine_is_known_by_its_heartbeat(tmp_path, elsewhere, monkeypatch):
    with another(tmp_path) as holder:
        with pytest.raises(ConfigError, match=f"process {holder.pid} on "), held(tmp_path):
            pass
        holder.send_signal(signal.SIGSTOP)  # to this machine, it is gone
        os.waitpid(holder.pid, os.WUNTRACED)  # until its heart stands still: a beat that was under way may come after the signal
        monkeypatch.setattr(writer, "SILENT", 0.5)
        with held(tmp_path):
            holder.send_signal(signal.SIGCONT)
            assert holder.wait(60) == 2
        assert f"silent for too long; another took the run directory: process {os.getpid()} on " in holder.stderr.read()


def test_a_lock_that_was_left_long_ago_is_taken_without_waiting(tmp_path, elsewhere, monkeypatch):
    (tmp_path / LOCK).write_text('{"host": "gone", "machine": "gone", "pid": 1, "since": 0}')
    os.utime(tmp_path / LOCK, (0, 0))
    monkeypatch.setattr(writer.time, "sleep", lambda _: pytest.fail("it waits"))
    with held(tmp_path):
        pass


def test_a_lock_of_the_future_is_waited_for_no_longer_than_any(tmp_path, elsewhere, monkeypatch, capsys):
    (tmp_path / LOCK).write_text('{"host": "gone", "machine": "gone", "pid": 1, "since": 0}')
    os.utime(tmp_path / LOCK, (2**32, 2**32))
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds
        assert clock[0] < 60

    monkeypatch.setattr(writer.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(writer.time, "sleep", sleep)
    with held(tmp_path):
        pass
    assert capsys.readouterr().err == f"waiting up to 30 s for a sign of life from another writer in {tmp_path}\n"


NO_HOLDER = ["{", "[]", "\0\0", "null", "[" * 4000, '{"since": "x"}', '{"machine": "m", "since": 1e400}', '{"machine": 3}']


@pytest.mark.parametrize("content", NO_HOLDER, ids=lambda content: content[:20])
def test_a_torn_lock(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    os.utime(tmp_path / LOCK, (0, 0))
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", NO_HOLDER, ids=lambda content: content[:20])
def test_a_lock_that_is_damaged_under_its_holder(tmp_path, content):
    with another(tmp_path) as holder:
        (tmp_path / LOCK).write_text(content)
        with (
            pytest.raises(ConfigError, match="another process is writing in this run directory: a process on another machine"),
            held(tmp_path),
        ):
            pass
        assert writer.occupant(tmp_path) == "a process on another machine"
        os.utime(tmp_path / LOCK, (0, 0))
        for _ in range(200):
            if (tmp_path / LOCK).stat().st_mtime:
                break
            time.sleep(0.05)
        assert (tmp_path / LOCK).stat().st_mtime  # it goes on, and shows that it lives
        assert holder.poll() is None


def test_where_nothing_can_be_written():
    with pytest.raises(StorageError, match="cannot write") as error, held("/proc/nowhere/run"):
        pass
    assert error.value.where.startswith("/proc/nowhere")


def test_training_is_refused_too(tmp_path):
    from llama_eqx import load_config
    from llama_eqx.training.loop import train

    with held(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        train(load_config(f"run_dir={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]  # before any work


def test_a_process_that_has_an_older_copy_of_the_run_directory_does_not_share_it(tmp_path, monkeypatch):
    from llama_eqx.training import identity

    monkeypatch.setattr(identity, "SHARED_WITHIN", 1)
    with another(tmp_path / "run") as killed:
        pass
    (tmp_path / "run" / "config.yaml").touch()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert writer.holder(tmp_path / "copy")["pid"] == killed.pid
    with held(tmp_path / "run"):
        identity.check_shared(tmp_path / "run")
        with pytest.raises(StorageError, match="does not see the files that process 0 writes"):
            identity.check_shared(tmp_path / "copy")


def test_whoever_looks_who_writes_is_not_taken_for_a_writer(tmp_path):
    """Sweeps that wait for a run look five times a second, and a restarted run must not be refused for it."""
    with held(tmp_path):
        pass
    with (tmp_path / LOCK).open("rb") as looking:
        writer.lock(looking, fcntl.LOCK_SH)  # as `occupant` does
        assert writer.occupant(tmp_path) == ""
        threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with held(tmp_path):
            assert writer.occupant(tmp_path).startswith(f"process {os.getpid()} on ")
