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
from elastic import BATCH, PARTS, config, opened

from llama_eqx.data.pipeline import Parts

HERE = pathlib.Path(__file__).parent


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


@pytest.mark.parametrize("change", ["seed=8", "data.weights.prose=0.4 data.weights.notes=0.4", "data.components.notes.rows=windows"])
def test_the_ledger_tells_another_run_apart(ran, monkeypatch, change):
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(ran / "cache"))
    here, there = (whole(opened(config(ran, *overrides))).after(3) for overrides in ((), change.split()))
    assert here.ledger != there.ledger


def test_the_parts_cover_the_counts_of_processes():
    assert {count for count, _, _ in PARTS} == {1, 2, 3, 4, 8}
    assert BATCH % 3 == BATCH % 8 == 0
