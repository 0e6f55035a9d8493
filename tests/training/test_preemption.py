"""Signals in every phase, to a process whose main thread sits in C code, where Python runs no handler."""

import os
import pathlib
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llama_eqx import load_config
from llama_eqx.train import main

CHILD = """
import contextlib, hashlib, pathlib, sys, time
from llama_eqx.errors import Stopped
from llama_eqx.training.preemption import Preemption

phase, grace, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])

def keep():
    print("keeping", flush=True)
    time.sleep(seconds)
    return "step 7 is saved"

def ready():
    print("ready", flush=True)

def compile():
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**8)  # a minute, without the lock of the interpreter

with Preemption(grace, next="the command") as preemption:
    if phase == "before":
        compile()
    try:
        with preemption.training(keep):
            if phase == "idle":
                with preemption.idle():
                    compile()
            if phase == "busy":
                compile()
            ready()
            while True:
                preemption.check(7)
                time.sleep(0.01)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
"""


def told(phase, *signals, grace=60.0, seconds=0.0):
    """Exit code, standard output and error of a process that is sent the first signal when it is ready, and others as it saves."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, phase, str(grace), str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    for number in signals[:1]:
        os.kill(child.pid, number)
    if signals[1:]:
        assert child.stdout.readline() == "keeping\n"
    for number in signals[1:]:
        os.kill(child.pid, number)
    out, err = child.communicate(timeout=50)
    return child.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_after_a_step(number):
    code, out, err = told("steps", number)
    assert code == (130 if number == signal.SIGINT else 75)
    assert out == "keeping\n"
    again = "" if number == signal.SIGINT else " (start me again)"
    assert err.splitlines()[-2:] == [f"{number.name}: step 7 is saved; exit code {code}{again}", "next: the command"]


def test_while_the_main_thread_compiles():
    code, out, err = told("idle", signal.SIGTERM)
    assert (code, out) == (75, "keeping\n")
    assert "SIGTERM: step 7 is saved; exit code 75 (start me again)\nnext: the command" in err


def test_before_the_first_step():
    code, out, err = told("before", signal.SIGTERM)
    assert (code, out) == (75, "")
    assert "before the first step" in err


@pytest.mark.parametrize(
    ("arguments", "number", "code", "said"),
    [
        ([], signal.SIGTERM, 75, "SIGTERM: nothing was being trained; exit code 75 (start me again)\n"),
        ([], signal.SIGUSR2, 75, "SIGUSR2: nothing was being trained; exit code 75 (start me again)\n"),
        (["-m"], signal.SIGTERM, -signal.SIGTERM, ""),
    ],
)
def test_while_it_is_imported(arguments, number, code, said, tmp_path):
    """A sweep does not say that nothing is being trained, as its jobs may be."""
    (tmp_path / "hydra.py").write_text("import hashlib\nprint('ready', flush=True)\nhashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**8)\n")
    places = os.pathsep.join(map(str, (tmp_path, pathlib.Path(__file__).parents[2])))
    child = subprocess.Popen(
        [sys.executable, "-m", "llama_eqx.train", *arguments],
        env={**os.environ, "PYTHONPATH": places},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.communicate(timeout=50) == ("", said)
    assert child.returncode == code


def test_when_the_grace_is_over():
    code, out, err = told("busy", signal.SIGTERM, grace=0.5)
    assert (code, out) == (75, "")
    assert "not finished after 0.5 s (checkpoint.grace)" in err


def test_the_second_interrupt_ends_at_once_and_the_first_says_so():
    code, _, err = told("idle", signal.SIGINT, signal.SIGINT, seconds=60)
    assert code == 130
    assert "a second Ctrl-C ends at once" in err.splitlines()[0]
    assert "checkpoints saved before are intact" in err


def test_another_signal_does_not_hurry_it():
    code, out, _ = told("idle", signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, seconds=0.5)
    assert (code, out) == (75, "")


def test_handlers_are_put_back(tmp_path: pathlib.Path):
    from llama_eqx.training.preemption import SIGNALS, Preemption

    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption(10.0):
        assert all(a is not b for a, b in zip(before, map(signal.getsignal, SIGNALS), strict=True))
    assert [signal.getsignal(number) for number in SIGNALS] == before
    Preemption(10.0).check(1)  # not entered, it leaves signals alone


@pytest.mark.parametrize(("processes", "several"), [(1, False), (2, True)])
def test_what_resumes_a_run_of_several_processes_says_that_it_is_for_each(tmp_path, monkeypatch, capsys, processes, several):
    told, evaluation = [], SimpleNamespace(loss=1.0, bits_per_byte=1.0, tokens=1)
    result = SimpleNamespace(evaluation=evaluation, sample="", speed={}, run_dir=tmp_path, checkpoint=tmp_path / "7", export=None)
    monkeypatch.setattr("llama_eqx.training.loop.train", lambda config, preemption: told.append(preemption._next) or result)
    monkeypatch.setattr("llama_eqx.processes.count", lambda: processes)
    main(load_config(f"run_dir={tmp_path}", "compile_cache=false"), [])
    resume = capsys.readouterr().out.partition("\nresume ")[2].partition("\nsample ")[0]
    assert resume.splitlines()[0].endswith(" train.steps=14")  # twice what is trained
    for said in (resume, told[0]):  # the command has its line to itself, to be copied
        assert said.splitlines()[1:] == ["            on each of the 2 hosts, or by the launcher that started this"] * several
