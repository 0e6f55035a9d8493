"""A supervised command is started again when that can help, and only then."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from llama_eqx.supervise import with_run_dir

# Appends a line to a file at every start; its nth start ends by the nth code: a negative one is a signal.
CHILD = """
import os, pathlib, signal, sys, time
log, codes = pathlib.Path(sys.argv[1]), [int(code) for code in sys.argv[2:]]
with log.open("a") as file:
    file.write("start\\n")
n = len(log.read_text().splitlines())
code = codes[min(n, len(codes)) - 1]
if code == 1000:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: sys.exit(75))
    log.with_suffix(".ready").touch()
    time.sleep(60)
if code < 0:
    os.kill(os.getpid(), -code)
    time.sleep(60)
sys.exit(code)
"""


def command(log: pathlib.Path, *codes: int, flags: tuple[str, ...] = ()) -> list[str]:
    child = [sys.executable, "-c", CHILD, str(log), *map(str, codes)]
    return [sys.executable, "-m", "llama_eqx.supervise", *flags, "--", *child]


@pytest.mark.parametrize(
    ("codes", "flags", "starts", "code", "said"),
    [
        ((0,), (), 1, 0, ""),
        ((75, 75, 0), (), 3, 0, "restart 2"),
        ((-signal.SIGKILL, -signal.SIGABRT, 0), (), 3, 0, "SIGABRT: restart 2"),
        ((137, 134, 0), (), 3, 0, "SIGABRT: restart 2"),
        *(((code,), (), 1, code, f"exit code {code}: not started again") for code in (1, 2, 3, 4, 5, 6, 130, 141)),
        ((75,), ("--restarts", "2"), 3, 75, "after 2 restarts"),
        ((75,), (), 3, 75, "3 starts in a row"),
        ((-signal.SIGKILL, -signal.SIGKILL, 0), ("--short", "0"), 3, 0, "restart 2"),
        *(((code,), ("--short", "2"), 2, 137, "2 starts in a row") for code in (-signal.SIGKILL, 137)),
    ],
)
def test_ends(tmp_path, codes, flags, starts, code, said):
    done = subprocess.run(command(tmp_path / "log", *codes, flags=flags), capture_output=True, text=True, timeout=60)
    assert (done.returncode, (tmp_path / "log").read_text().count("start")) == (code, starts)
    assert said in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_is_passed_on_and_ends_it(tmp_path, number):
    supervisor = subprocess.Popen(command(tmp_path / "log", 1000), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.ready").exists():
        time.sleep(0.02)
    os.kill(supervisor.pid, number)
    _, said = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 75
    assert (tmp_path / "log").read_text() == "start\n"
    assert f"after {number.name}: not started again" in said


def test_nothing_to_start():
    done = subprocess.run([sys.executable, "-m", "llama_eqx.supervise", "--", "no-such-program"], capture_output=True, text=True)
    assert done.returncode == 127
    assert "no-such-program cannot be started" in done.stderr


@pytest.mark.parametrize("train", [["python", "-m", "llama_eqx.train", "seed=1"], ["python", "scripts/launch_local.py", "2", "seed=1"]])
def test_every_start_is_of_the_same_run(capsys, train):
    named = with_run_dir(train)
    assert named[:-1] == train
    assert named[-1].startswith("run_dir=outputs/")
    assert with_run_dir(named) == named
    for other in (["true"], [*train, "-m"]):  # each job of a sweep has its own
        assert with_run_dir(other) == other
    assert capsys.readouterr().err.count("run_dir=") == 1
