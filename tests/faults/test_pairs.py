"""Two processes of one run: both stop after the same step when one is told to, and begin again when one is killed."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest
from harness import EVERY, command, environment, leftovers, outcome

from llama_eqx.checkpoint.manifest import find_damage
from llama_eqx.checkpoint.restore import steps

pytestmark = pytest.mark.faults
MESH = ["mesh=cpu-8", "mesh.devices=2", "mesh.hosts=2", "train.batch_size=8", "distributed.heartbeat=600"]  # a busy machine is not lost
TWELVE = "train.steps=12"  # four saves
LONG = ["train.steps=2000", "train.eval_every=2000", "checkpoint.every=1000"]


def both(folder, cache, *more, supervised=False, crash_at=("", "")):
    """Two processes, which die at the points given."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    train = [sys.executable, "-m", *command(folder, *MESH, *more)]
    if supervised:
        train = [sys.executable, "-m", "llama_eqx.supervise", "--short", "9", "--", *train]
    return [
        subprocess.Popen(
            train,
            env={**environment(cache), **address, "JAX_PROCESS_ID": str(i), "LLAMA_EQX_CRASH_AT": crash_at[i]},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def ended(processes) -> tuple[list[int], list[str]]:
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.parametrize("told", [0, 1])
def test_both_stop_after_the_same_step(tmp_path: pathlib.Path, told):
    processes = both(tmp_path / "run", tmp_path, *LONG)
    first = processes[0]
    assert first.stderr is not None
    said = []
    while not said or not said[-1].startswith("step    5/"):
        said.append(first.stderr.readline())
        assert said[-1], said
    os.kill(processes[told].pid, signal.SIGTERM)
    codes, rest = ended(processes)
    assert codes == [75, 75], rest
    assert steps(tmp_path / "run" / "checkpoints"), rest
    (step,) = steps(tmp_path / "run" / "checkpoints")
    assert 5 <= step < 2000
    assert f"SIGTERM: step {step} is saved; exit code 75" in rest[told]
    found = find_damage(tmp_path / "run" / "checkpoints" / str(step))
    assert (found.damaged, found.missing, found.extra) == ({}, (), ())

    codes, rest = ended(both(tmp_path / "run", tmp_path, *LONG, f"train.steps={step + 3}", f"train.eval_every={step + 3}"))
    assert codes == [0, 0], rest
    assert f"resumed from step {step}" in rest[0]
    records = outcome(tmp_path / "run").records
    assert [float.fromhex(record["step"]) for record in records if "train/loss" in record] == list(range(1, step + 4))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of the compile cache, and what becomes of a pair that is left alone."""
    folder = tmp_path_factory.mktemp("pair")
    codes, said = ended(both(folder / "run", folder, TWELVE))
    assert codes == [0, 0], said
    return folder, outcome(folder / "run")


@pytest.mark.parametrize(
    ("crash_at", "most"),  # kills: after eight steps a start has saved step 6 or not yet
    [
        pytest.param(("", "step:8"), 2, id="process 1 after a step"),
        pytest.param(("step:8", ""), 2, id="process 0 after a step"),
        pytest.param(("finalise:2", ""), 3, id="process 0 before the manifest"),
        pytest.param(("", "evaluate:3"), 1, id="process 1 while it evaluates"),
    ],
)
def test_one_is_killed_again_and_again(tmp_path, undisturbed, crash_at, most):
    cache, expected = undisturbed
    codes, said = ended(both(tmp_path / "run", cache, TWELVE, supervised=True, crash_at=crash_at))
    assert codes == [0, 0], said
    victim = 1 if crash_at[1] else 0
    restarts = [re.findall(r"supervise: ended by ([\w ]+): restart", text) for text in said]
    killed = len(restarts[victim])
    assert 1 <= killed <= most, said
    assert restarts[victim] == ["SIGKILL"] * killed, said
    assert restarts[1 - victim] == ["exit code 75"] * killed, said
    resumed = [int(step) for step in re.findall(r"resumed from step (\d+)", said[0])]
    assert len(resumed) == killed, said
    assert all(step % EVERY == 0 for step in resumed), said
    assert outcome(tmp_path / "run") == expected
    assert leftovers(tmp_path / "run") == []
    assert expected.progress["step"] == 12
