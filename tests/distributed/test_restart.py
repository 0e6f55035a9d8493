"""A run that lost a process, or goes on elsewhere, is the run that it was."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_lost import free_port, until
from two_processes import STEPS, overrides

from llama_eqx import load_config, load_pretrained
from llama_eqx.sharding import MeshConfig
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.faults


def records(run_dir):
    timed = ("perf/", "data/starved")
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in read_metrics(run_dir / "metrics.jsonl")]


def losses(run_dir):
    return [record["train/loss"] for record in records(run_dir) if "train/loss" in record]


def supervised(run_dir, processes) -> list[subprocess.Popen[bytes]]:
    """As many supervisors of one process each, of a run with eight devices."""
    run_dir.parent.mkdir(exist_ok=True)
    port, started = free_port(), []
    for process in range(processes):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(process)}
        mesh = ["mesh=cpu-8", f"mesh.hosts={processes}", "checkpoint.every=3", "distributed.heartbeat=10"]
        train = [sys.executable, "-m", "llama_eqx.train", *overrides(run_dir, *mesh)]
        said = (run_dir.parent / f"{run_dir.name}.said.{process}").open("w")
        with said:
            supervise = [sys.executable, "-m", "llama_eqx.supervise", "--", *train]
            started.append(subprocess.Popen(supervise, env=environment, stdout=said, stderr=said))
    return started


def child(supervisor) -> int:
    return int(pathlib.Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert [process.wait(300) for process in supervised(run_dir, 2)] == [0, 0]
    return run_dir


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("step", [1, 8, 13])
def test_a_run_that_lost_a_process_is_restarted_and_ends_the_same(whole, tmp_path, victim, step):
    run_dir = tmp_path / "run"
    started = supervised(run_dir, 2)
    metrics = run_dir / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= step)
    os.kill(child(started[victim]), signal.SIGKILL)
    assert [process.wait(300) for process in started] == [0, 0], (tmp_path / "run.said.0").read_text()
    assert "restart 1" in (tmp_path / "run.said.0").read_text() + (tmp_path / "run.said.1").read_text()
    assert records(run_dir) == records(whole)
    for a, b in zip(jax.tree.leaves(load_pretrained(run_dir)), jax.tree.leaves(load_pretrained(whole)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_run_goes_on_with_other_meshes_and_numbers_of_processes(whole, tmp_path, monkeypatch, capfd):
    """1 -> 2 -> 4 -> 8 devices of this process, in other grids, and the rest of the steps with two processes."""
    run_dir, build = tmp_path / "run", MeshConfig.build
    grids = [(1, {"fsdp": 1}), (2, {"fsdp": 2}), (4, {"data": 2, "fsdp": 2}), (4, {"data": 4, "fsdp": 1}), (8, {"fsdp": 4, "tensor": 2})]
    for part, (devices, grid) in enumerate(grids):
        monkeypatch.setattr(MeshConfig, "build", lambda self, devices=devices: build(self, jax.devices()[:devices]))
        sharding = ["sharding=fsdp_tensor"] if "tensor" in grid else []
        steps = f"train.steps={3 * (part + 1)}"
        train(load_config(*overrides(run_dir, steps, "checkpoint.every=3", *sharding, *(f"mesh.{axis}={n}" for axis, n in grid.items()))))
        said = capfd.readouterr().err
        assert ("no longer bit by bit" in said) is bool(part)
    assert [process.wait(300) for process in supervised(run_dir, 2)] == [0, 0]
    assert "computed.processes: 1 -> 2" in (tmp_path / "run.said.0").read_text()
    np.testing.assert_allclose(losses(run_dir), losses(whole), rtol=1e-5)
    ledgers = [[record.get("data/ledger") for record in records(folder) if "train/loss" in record] for folder in (run_dir, whole)]
    assert ledgers[0] == ledgers[1]
    assert len(ledgers[0]) == STEPS
