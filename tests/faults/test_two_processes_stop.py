"""One of two processes is told to stop: both save the same step and ask to be started again."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from harness import command, environment, outcome

from llama_eqx.checkpoint.manifest import find_damage
from llama_eqx.checkpoint.restore import steps

MESH = ["mesh=cpu-8", "mesh.hosts=2", "train.steps=2000", "train.eval_every=2000", "checkpoint.every=1000", "train.batch_size=8"]


def both(folder, cache, *more):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *command(folder, *MESH, *more)],
            env={**environment(cache), **address, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


@pytest.mark.faults
@pytest.mark.parametrize("told", [0, 1])
def test_both_stop_after_the_same_step(tmp_path: pathlib.Path, told):
    processes = both(tmp_path / "run", tmp_path)
    first = processes[0]
    assert first.stderr is not None
    said = []
    while not said or not said[-1].startswith("step    5/"):
        said.append(first.stderr.readline())
        assert said[-1], said
    os.kill(processes[told].pid, signal.SIGTERM)
    rest = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], rest
    assert steps(tmp_path / "run" / "checkpoints"), rest
    (step,) = steps(tmp_path / "run" / "checkpoints")
    assert 5 <= step < 2000
    assert f"SIGTERM: step {step} is saved; exit code 75" in rest[told]
    found = find_damage(tmp_path / "run" / "checkpoints" / str(step))
    assert (found.damaged, found.missing, found.extra) == ({}, (), ())

    processes = both(tmp_path / "run", tmp_path, f"train.steps={step + 3}", f"train.eval_every={step + 3}")
    rest = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], rest
    assert f"resumed from step {step}" in rest[0]
    found = outcome(tmp_path / "run")
    assert [float.fromhex(record["step"]) for record in found.records if "train/loss" in record] == list(range(1, step + 4))
