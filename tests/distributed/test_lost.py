"""A process that is dead, stopped or stuck ends the others, which say where they were and ask to be started again."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
HEARTBEAT = 3


def start(run_dir, command, process, processes, port):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "JAX_NUM_CPU_DEVICES": "2"}
    place = [f"distributed.coordinator=localhost:{port}", f"distributed.processes={processes}", f"distributed.process={process}"]
    with (run_dir / f"said.{process}").open("a") as said:
        return subprocess.Popen(
            [sys.executable, *command, f"run_dir={run_dir}", *place],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def until(happened, seconds=120):
    for _ in range(seconds * 20):
        if happened():
            return
        time.sleep(0.05)
    pytest.fail("it did not happen")


@pytest.fixture
def gathered(tmp_path):
    """Starts so many processes, and waits until they compute together."""
    started = []

    def gather(processes, *settings):
        port = free_port()
        command = [str(HERE / "harmed.py"), f"distributed.heartbeat={HEARTBEAT}", *settings]
        started.extend(start(tmp_path, command, process, processes, port) for process in range(processes))
        until(lambda: all((tmp_path / f"at.{process}").exists() for process in range(processes)))
        return started

    yield gather
    for process in started:
        process.kill()
        process.wait()


FAULTS = [pytest.param("SIGKILL", 0, 2), pytest.param("SIGSTOP", 1, 2)] + [
    pytest.param(fault, process, 3, marks=pytest.mark.faults)
    for fault in ("SIGKILL", "SIGSEGV", "SIGSTOP", "stuck")
    for process in (0, 1, 2)
]


@pytest.mark.parametrize(("fault", "victim", "processes"), FAULTS)
def test_survivors_end(tmp_path, gathered, fault, victim, processes):
    started = gathered(processes, *(["distributed.stall=3"] if fault == "stuck" else []))
    if fault == "stuck":
        (tmp_path / f"stuck.{victim}").touch()
    else:
        os.kill(started[victim].pid, signal.Signals[fault])
    survivors = [i for i in range(processes) if i != victim or fault == "stuck"]
    for i in survivors:
        assert started[i].wait(timeout=HEARTBEAT + 10) == 75, (tmp_path / f"said.{i}").read_text()  # the promise, with nothing to spare
        said = (tmp_path / f"said.{i}").read_text()
        cause = {"SIGSTOP": f"no sign of life for {HEARTBEAT} s", "stuck": "no step for 3 s"}.get(fault, "ended without saying why")
        assert cause in said
        assert "Traceback" not in said
        log = tmp_path / (f"log.{i}.txt" if i else "log.txt")
        assert f"stacks: {log}" in said
        assert 'harmed.py", line' in log.read_text().partition("thread MainThread, most recent call last:")[2]


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_was_late_for_less_than_the_heartbeat_is_waited_for(tmp_path, gathered, victim):
    started = gathered(2)
    os.kill(started[victim].pid, signal.SIGSTOP)
    time.sleep(HEARTBEAT / 3)
    os.kill(started[victim].pid, signal.SIGCONT)
    now = (tmp_path / f"at.{victim}").read_text()
    until(lambda: (tmp_path / f"at.{victim}").read_text() not in ("", now))
    time.sleep(HEARTBEAT)
    assert [process.poll() for process in started] == [None, None]
