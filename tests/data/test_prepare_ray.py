"""The same work on a Ray cluster of two nodes on this machine."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from llama_eqx import load_config
from llama_eqx.data.prepare import prepare
from llama_eqx.data.shards import open_dataset
from llama_eqx.errors import DataError

ROOT = pathlib.Path(__file__).resolve().parents[2]
ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    # Workers import the package from where this process has it.
    os.environ["PYTHONPATH"] = str(ROOT)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False})
    cluster.add_node(num_cpus=1, object_store_memory=2**27)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(3):
        lines = (json.dumps({"text": f"{j % 900} of {i} " * 150}) + "\n" for j in range(1000))
        (folder / f"{i}.jsonl").write_text("".join(lines))
    return folder


def config(corpus, output, engine, *overrides):
    settings = ["tokenizer=bytes", "unit_bytes=50_000", "shard_tokens=500_000", "dedup=true", "prepare.workers=2", *overrides]
    return load_config(f"input={corpus}", f"output={output}", f"prepare.engine={engine}", *settings, name="prepare")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("local") / "out"
    prepare(config(corpus, output, "local"))
    return contents(output)


def test_ray_gives_the_bytes_of_local_processes(cluster, corpus, expected, tmp_path):
    done = prepare(config(corpus, tmp_path / "out", "ray"))
    assert contents(tmp_path / "out") == expected
    assert done.duplicates == 300


def test_ray_that_was_started_for_it_leaves_nothing(corpus, expected, tmp_path):
    def leaves():
        found = set(pathlib.Path(tmp_path).glob("ray*"))
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found |= {path} if str(tmp_path).encode() in path.read_bytes() else set()
        return found

    command = [sys.executable, "-m", "llama_eqx.prepare", f"input={corpus}", f"output={tmp_path / 'out'}", "tokenizer=bytes"]
    command += ["unit_bytes=50_000", "shard_tokens=500_000", "dedup=true", "prepare.engine=ray", "prepare.workers=2"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    before = leaves()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert leaves() == before
    assert contents(tmp_path / "out") == expected


def workers():
    """Processes that are at a unit now: Ray names them so."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::run_unit" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_worker_changes_nothing(cluster, corpus, expected, tmp_path):
    killed = []

    def kill():
        while len(killed) < 3 and not (tmp_path / "out" / "index.json").exists():
            for pid in workers()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                time.sleep(0.3)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        prepare(config(corpus, tmp_path / "out", "ray"))
    finally:
        thread.join()
    assert len(killed) == 3
    assert contents(tmp_path / "out") == expected


def test_a_bad_line_is_named_as_by_local_processes(cluster, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 10_000 + "?\n")
    with pytest.raises(DataError, match="not a JSON object") as error:
        prepare(config(tmp_path / "a.jsonl", tmp_path / "out", "ray"))
    assert error.value.where == f"{tmp_path}/a.jsonl:10001"
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 10_000)


def test_a_lost_node_changes_nothing(cluster, corpus, expected, tmp_path):
    node = cluster.add_node(num_cpus=1, object_store_memory=2**27)
    thread = threading.Timer(1.0, cluster.remove_node, (node, False))
    thread.start()
    prepare(config(corpus, tmp_path / "out", "ray", "prepare.workers=3"))
    thread.join()
    assert contents(tmp_path / "out") == expected
    assert open_dataset(tmp_path / "out", remedy="").train.documents
