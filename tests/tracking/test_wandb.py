"""W&B may be down in any way: the run neither waits for it nor loses anything, and is told how to upload it later."""

import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from wandb_server import Server

from llama_eqx import load_config
from llama_eqx.tracking import wandb
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.tracker import Tracker

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def serve(monkeypatch):
    servers = []

    def start(state: str) -> Server:
        servers.append(Server(state))
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].url)
        return servers[-1]

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "PATIENCE", {"online": 2.0, "offline": 30.0})
    yield start
    for server in servers:
        server.die()


def tracker(run_dir, start=0, mode="online") -> Tracker:
    config = load_config(f"tracking.wandb.mode={mode}").tracking
    return Tracker(config, run_dir, settings={"marked": "in the config"}, steps=100, start=start)


def records(folder, kind) -> list[dict]:
    """Those of a kind in a folder of W&B, read by its own tool."""
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines()
    return [record[kind] for record in map(json.loads, lines) if record["type"] == kind]


def drawn(folder) -> list[dict]:
    return [record["item"] for record in records(folder, "history")]


def until(happened):
    for _ in range(600):
        if happened():
            return
        time.sleep(0.05)
    pytest.fail("it did not happen")


def told_to_sync(said: str) -> pathlib.Path:
    warning = [line for line in said.splitlines() if "wandb sync" in line]
    assert len(warning) == 1, said
    return pathlib.Path(re.search(r"later: wandb sync (.*)", warning[0])[1])


def test_a_run_is_uploaded(tmp_path, serve, capsys, monkeypatch):
    server = serve("up")
    monkeypatch.setattr(wandb, "PATIENCE", {"online": 60.0})
    with tracker(tmp_path) as told:
        told.log(1, {"train/loss": 2.0})
        told.log(2, {"train/loss": float("nan")})
        told.log(2, {"val/loss": 1.5})
        told.sample(2, "<b>")
    said = capsys.readouterr().err
    assert f"W&B: {server.url}/entity/project/runs/" in said
    assert "warning" not in said
    steps = {record["_step"]: record for record in server.history}
    assert (steps[1]["train/loss"], steps[2]["val/loss"]) == (2.0, 1.5)
    assert math.isnan(steps[2]["train/loss"])
    assert "sample" in steps[2]


@pytest.mark.parametrize("way", ["closed port", "dies", "black hole", "500", "finish hangs"])
def test_down(tmp_path, serve, capsys, way):
    server = serve({"black hole": "silent", "500": "500"}.get(way, "up"))
    if way == "closed port":
        server.die()
    with tracker(tmp_path) as told:
        told.log(1, {"train/loss": 2.0})
        if way in ("dies", "finish hangs"):
            until(lambda: told._wandb._folder or told._wandb.listen())  # W&B has begun
        if way == "dies":
            server.die()
        if way == "finish hangs":
            server.state = "silent"
        told.log(2, {"train/loss": 1.0})
        told.sample(2, "a sample")
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    folder = told_to_sync(capsys.readouterr().err)
    assert [record["_step"] for record in drawn(folder)][:2] == [1, 2]
    assert "a sample" in next(folder.glob("files/media/html/*.html")).read_text()


@pytest.mark.parametrize("asked", ["true", "false"])
def test_a_checkpoint_goes_along_if_it_is_asked_for(tmp_path, monkeypatch, asked):
    """Offline: what `wandb sync` uploads later is the checkpoint as it lies there, and not a copy."""
    monkeypatch.setattr(wandb, "PATIENCE", {"offline": 60.0})
    folder = tmp_path / "checkpoints" / "7"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 1000)
    monkeypatch.setenv("WANDB_TAGS", "of,everything")
    config = load_config("tracking.wandb.mode=offline", f"tracking.wandb.artifact={asked}", "tracking.wandb.notes=mine").tracking
    with Tracker(config, tmp_path, settings={}, steps=7, start=0) as told:
        told.log(7, {"train/loss": 1.0})
        told.checkpoint(folder)
    (run,) = tmp_path.glob("wandb/offline-run-*")
    about = records(run, "run")[0]
    assert (about["tags"], about["notes"]) == (["of", "everything"], "mine")
    found = records(run, "artifact")
    assert len(found) == (asked == "true")
    for artifact in found:
        (file,) = artifact["manifest"]["contents"]
        assert (file["local_path"], file["size"]) == (str(folder / "weights"), "1000")
        assert (artifact["type"], artifact["metadata"]) == ("model", '{"step":7}')
        assert sorted(artifact["aliases"]) == ["latest", "step-7"]


def test_it_dies_by_itself(tmp_path, serve, capsys):
    serve("up")
    with tracker(tmp_path) as told:
        process = told._wandb._process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        told.log(1, {"train/loss": 2.0})
        assert "warning: W&B does not work: its process ended (-9); the run goes on" in capsys.readouterr().err
        told.log(2, {"train/loss": 1.0})
    assert [record["_step"] for record in drawn(told_to_sync(capsys.readouterr().err))] == [1, 2]


def test_without_an_account(tmp_path, serve, capsys, monkeypatch):
    serve("up")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))  # and its .netrc
    with tracker(tmp_path / "run") as told:
        told._wandb._process.wait()
        told.log(1, {"train/loss": 2.0})
        assert re.search(r"warning: W&B does not work: UsageError: .*; the run goes on", capsys.readouterr().err)
    assert len(drawn(told_to_sync(capsys.readouterr().err))) == 1


@pytest.mark.parametrize("heard", [True, False])
def test_broken(tmp_path, capsys, monkeypatch, heard):
    """However short a run is, it says that there is no W&B, and names no folder that is not there."""
    monkeypatch.setattr(wandb, "PATIENCE", {"offline": 60.0})
    (tmp_path / "wandb.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    with tracker(tmp_path / "run", mode="offline") as told:
        if heard:
            until(lambda: told._wandb.listen() or not told._wandb._process)
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "warning: W&B" + " does not work" * (not heard) + ": ImportError: broken; metrics.jsonl has everything"
    assert "wandb sync" not in said


RUN = """
import os, sys, signal
from llama_eqx import load_config
from llama_eqx.tracking.tracker import Tracker
with Tracker(load_config().tracking, sys.argv[1], settings={}, steps=9, start=0) as told:
    for step in range(1, 4):
        told.log(step, {"train/loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_recorded_is_drawn_and_the_resumed_one_holds_all(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "PATIENCE", {"offline": 60.0})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", RUN, tmp_path], env=environment, check=False).returncode == -signal.SIGKILL
    until(lambda: list(tmp_path.glob("wandb/offline-run-*")))
    (first,) = tmp_path.glob("wandb/offline-run-*")
    until(lambda: len(drawn(first)) == 3)
    time.sleep(1)  # the folders are named by the second
    with tracker(tmp_path, start=2, mode="offline") as told:
        told.log(3, {"train/loss": 1.0})
        told.log(4, {"train/loss": 1.0})
    (second,) = set(tmp_path.glob("wandb/offline-run-*")) - {first}
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == (tmp_path / "wandb_id").read_text().strip()
    assert [record["_step"] for record in drawn(second)] == [1, 2, 3, 4]
