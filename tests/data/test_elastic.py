"""A run that goes on with another number of processes sees the same batches, row by row: packed, mixed and shuffled."""

import json
import os
import pathlib
import random
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from elastic import BATCH, PARTS, SEQ, config, opened, settings

from llama_eqx.data.pipeline import Parts
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.training.loop import train

HERE = pathlib.Path(__file__).parent
TINY = [
    *("model.dims.layers=1", "model.dims.embed=16", "model.dims.heads=2", "model.dims.kv_heads=2", "model.dims.head_dim=8"),
    *(
        "model.dims.mlp=16",
        "sharding=ddp",
        "schedule=constant",
        "schedule.warmup_steps=2",
        "schedule.peak=1e-2",
        "tracking.wandb.mode=disabled",
    ),
    *(f"train.batch_size={BATCH}", f"train.seq_len={SEQ}", "train.log_every=1", "train.eval_every=1000", "train.sample_tokens=0"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two kinds of text and some conversations, with a cache of its own."""
    folder, rng = tmp_path_factory.mktemp("elastic"), random.Random(0)
    for kind in ("prose", "notes"):
        (folder / kind).mkdir()
        for i in range(80):
            (folder / kind / f"{i:03}.txt").write_text(f"{kind} {i}: " + "word " * rng.randrange(1, 40))
    lines = [{"prompt": f"{i} + 1?", "response": f"{i + 1}"} for i in range(60)]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def ran(folder):
    environment = {**os.environ, "LLAMA_EQX_CACHE": str(folder / "cache"), "PYTHONPATH": str(HERE.parents[1])}
    subprocess.run([sys.executable, "-W", "ignore", HERE / "elastic.py", folder], env=environment, check=True, timeout=300)
    return folder


def whole(data):
    return Parts(data.train, data.order, BATCH, fingerprint=data.fingerprint)


def test_batches_and_ledger_do_not_depend_on_the_processes(ran, monkeypatch):
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(ran / "cache"))
    data = opened(config(ran))
    parts = whole(data)
    for count, first, last in PARTS:
        for step in range(first, last):
            leaves = jax.tree.leaves(parts[step].batch)
            read = [np.load(ran / f"{step}-{shard}.npz") for shard in range(count)]
            for i, leaf in enumerate(leaves):
                assert np.array_equal(np.concatenate([part[f"arr_{i}"] for part in read]), leaf)
        assert tuple(json.loads((ran / f"{last}.json").read_text())) == parts.after(last)
    assert min(data.epochs(PARTS[-1][-1] * BATCH).values()) > 1  # every source was shuffled anew
    assert data.epochs(0) == {"data/epoch/prose": 0, "data/epoch/notes": 0, "data/epoch/answers": 0}


@pytest.mark.slow
def test_two_processes_that_share_their_devices_place_the_same_batches(ran, monkeypatch):
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(ran / "cache"))
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [sys.executable, HERE / "two_processes.py", ran]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    processes = [subprocess.Popen([*command, str(process), str(port)], env=environment) for process in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    parts = whole(opened(config(ran)))
    for step in range(4, 8):
        halves = [np.load(ran / f"two-{step}-{process}.npz") for process in range(2)]
        assert [int(half["first"]) for half in halves] == [0, BATCH // 2]
        assert np.array_equal(np.concatenate([half["rows"] for half in halves]), parts[step - 1].batch.tokens)
        assert {int(half["ledger"]) for half in halves} == {parts.after(step).ledger}


def train_on(processes, folder, run_dir, steps):
    """`train` goes on to so many steps, on so many processes with a device each."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parents[1]),
        "LLAMA_EQX_CACHE": str(folder / "cache"),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    with socket.socket() as found:
        found.bind(("localhost", 0))
        place = f"distributed.coordinator=localhost:{found.getsockname()[1]}"
    command = [sys.executable, "-m", "llama_eqx.train", *settings(folder), *TINY, f"run_dir={run_dir}", f"train.steps={steps}"]
    places = [[place, f"distributed.processes={processes}", f"distributed.process={i}"] for i in range(processes)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, *(one if processes > 1 else [])], env=environment, **streams) for one in places]
    try:
        said = [process.communicate(timeout=600)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, said


def test_a_run_of_two_processes_goes_on_with_one_and_its_ledger(folder, tmp_path, monkeypatch):
    train_on(2, folder, tmp_path, 4)
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(folder / "cache"))
    train(config(folder, *TINY, f"run_dir={tmp_path}", "train.steps=8"))
    parts = whole(opened(config(folder)))
    found = [record["data/ledger"] for record in read_metrics(tmp_path / "metrics.jsonl") if "data/ledger" in record]
    assert found == [parts.after(step).ledger for step in range(1, 9)]


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(folder, tmp_path, monkeypatch):
    """Through the verb: each time it is started again on others, and it has the records of one that never was."""
    counts = [1, 2, 3, 4, 8, 1]
    for i, processes in enumerate(counts, 1):
        train_on(processes, folder, tmp_path / "chain", 4 * i)
    train_on(1, folder, tmp_path / "alone", 4 * len(counts))
    chain, alone = (
        [record for record in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in record] for name in ("chain", "alone")
    )
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(folder / "cache"))
    data = opened(config(folder))
    parts = whole(data)
    assert [record["step"] for record in chain] == [record["step"] for record in alone] == list(range(1, 4 * len(counts) + 1))
    for record, other in zip(chain, alone, strict=True):
        progress = parts.after(record["step"])
        assert (record["data/ledger"], record["tokens"]) == (progress.ledger, progress.tokens) == (other["data/ledger"], other["tokens"])
        assert record["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
    started = [json.loads(line) for line in (tmp_path / "chain" / "provenance.jsonl").read_text().splitlines()]
    assert [start["computed"]["processes"] for start in started] == counts


@pytest.mark.parametrize("change", ["seed=8", "data.weights.prose=0.4 data.weights.notes=0.4", "data.components.notes.rows=windows"])
def test_the_ledger_tells_another_run_apart(ran, monkeypatch, change):
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(ran / "cache"))
    here, there = (whole(opened(config(ran, *overrides))).after(3) for overrides in ((), change.split()))
    assert here.ledger != there.ledger


def test_the_parts_cover_the_counts_of_processes():
    assert {count for count, _, _ in PARTS} == {1, 2, 3, 4, 8}
    assert BATCH % 3 == BATCH % 8 == 0
