"""Runs that are killed, started again by supervise, and compared with one that was left alone."""

import contextlib
import hashlib
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
TEXT = HERE.parent / "golden" / "text.md"
STEPS, EVERY = 24, 3
SETTINGS = {
    "model.dims.layers": 2,
    "model.dims.embed": 32,
    "model.dims.heads": 4,
    "model.dims.kv_heads": 2,
    "model.dims.head_dim": 8,
    "model.dims.mlp": 48,
    "model.dropout": 0.1,
    "data": "text",
    "data.path": TEXT,
    "tokenizer": "bytes",
    "tracking.wandb.mode": "disabled",
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.seq_len": 32,
    "train.log_every": 1,
    "train.eval_every": 4,
    "train.sample_tokens": 0,
    "checkpoint.every": EVERY,
    "schedule.warmup_steps": 2,
}
RUNS = 50  # each of which is killed six times and told to stop once


class Outcome(NamedTuple):
    """What must be the same: the SHA-256 of every array, the records of every step, and how far the data is."""

    leaves: dict[str, str]
    records: list[dict[str, Any]]
    progress: dict[str, int]


def drawn(number: int, seconds: float) -> list[str]:
    """The faults of a run, the same for the same number; `seconds` a run takes that is left alone.

    Each is for one start after another: a crash point (see crash.py), or a kill from outside, "after:0.7" seconds or "saving:0.01" seconds
    after a save has begun. None is so late that the one before it would have ended the run, but the last.
    """
    chance = random.Random(number)
    told = chance.choice(("compile:1", f"step:{chance.randint(1, 6)}", "evaluate:1", "save:1", "finalise:1")) + ":SIGTERM"
    faults = [
        f"saving:{chance.uniform(0, 0.05):.4f}",
        chance.choice(("save:1", "save:2", "finalise:1", "finalise:2")),
        chance.choice(("manifest:1", "manifest:2", "rename:1", "rename:2", "remove:1")),
        chance.choice(("compile:1", f"step:{chance.randint(1, 6)}", "evaluate:1", "evaluate:2")),
        told,
    ]
    chance.shuffle(faults)
    faults.insert(faults.index(told) + 1, "restore:1")  # there is something by then
    return [*faults, f"after:{chance.uniform(0, seconds):.4f}"]


def environment(cache: pathlib.Path) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "llama_eqx-faults-compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "LLAMA_EQX_CACHE": str(cache),
        "PYTHONPATH": str(HERE.parents[1]),
    }


@contextlib.contextmanager
def served(cache: pathlib.Path) -> Iterator[str]:
    """The socket of a server that starts processes."""
    folder = tempfile.mkdtemp(prefix="faults-")
    path = f"{folder}/socket"
    with subprocess.Popen([sys.executable, str(HERE / "server.py"), path], env=environment(cache)) as server:
        while not pathlib.Path(f"{path}.ready").exists():
            assert server.poll() is None
            time.sleep(0.05)
        yield path
        server.kill()
    shutil.rmtree(folder)


def command(run_dir: pathlib.Path, *overrides: str) -> list[str]:
    settings = {**SETTINGS, "run_dir": run_dir}
    return ["llama_eqx.train", *(f"{key}={value}" for key, value in settings.items()), *overrides]


def run(run_dir: pathlib.Path, server: str, faults: list[str]) -> dict[str, Any]:
    """Trains to the end under supervise, which does not wait here, through the faults. What is returned says how that went."""
    log = run_dir.with_name(f"{run_dir.name}.starts")
    start = [sys.executable, "-I", "-S", str(HERE / "nth_start.py"), server, ";".join(faults), str(log), str(run_dir), *command(run_dir)]
    supervise = "from llama_eqx import supervise; supervise.time.sleep = lambda _: None; supervise.main()"
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", supervise, "--short", "99", "--", *start],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, said = process.communicate(timeout=1200)
    return {
        "code": process.returncode,
        "said": said,
        "resumed": [int(step) for step in re.findall(r"resumed from step (\d+)", said)],
        "ended": re.findall(r"supervise: ended by ([\w ]+): restart", said),
        "seconds": round(time.monotonic() - begun, 1),
    }


def expected(faults: list[str]) -> list[str]:
    """How the starts end that meet these faults."""
    return ["exit code 75" if fault.endswith("SIGTERM") else "SIGKILL" for fault in faults]


def outcome(run_dir: pathlib.Path) -> Outcome:
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    from llama_eqx.checkpoint.manifest import read_manifest
    from llama_eqx.checkpoint.restore import read, steps
    from llama_eqx.tracking.jsonl import read_metrics

    step = steps(run_dir / "checkpoints")[-1]
    folder = run_dir / "checkpoints" / str(step)
    here, found = jax.sharding.SingleDeviceSharding(jax.devices()[0]), ocp.checkpointables_metadata(str(folder)).metadata
    wanted = {
        part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), found[part]) for part in ("model", "training")
    }
    arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(read(folder, wanted))}
    timed = ("perf/", "data/starved")
    records = [
        {name: float(value).hex() for name, value in record.items() if not name.startswith(timed)}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]
    leaves = {name: f"{x.dtype}{x.shape} {hashlib.sha256(np.asarray(x).tobytes()).hexdigest()}" for name, x in arrays.items()}
    return Outcome(leaves, records, read_manifest(folder)["progress"])


def leftovers(run_dir: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.isdecimal())


class Reference(NamedTuple):
    """A run that was left alone, in how many seconds, and the server that started it."""

    outcome: Outcome
    seconds: float
    server: str


def reference(folder: pathlib.Path, server: str) -> Reference:
    run(folder / "first", server, [])  # fills the cache of compiled programs
    done = run(folder / "run", server, [])
    assert done["code"] == 0, done["said"]
    found = outcome(folder / "run")
    assert [float.fromhex(record["step"]) for record in found.records if "train/loss" in record] == list(range(1, STEPS + 1))
    assert found.progress["step"] == STEPS
    assert outcome(folder / "first") == found  # the same command twice
    return Reference(found, done["seconds"], server)


def attempt(number: int, against: Reference) -> dict[str, Any]:
    """Makes run `number` in a folder of its own and says what came of it; `identical` is what it is about."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"faults-{number}-"))
    faults = drawn(number, against.seconds)
    try:
        done = run(folder / "run", against.server, faults)
        same = done["code"] == 0 and outcome(folder / "run") == against.outcome
        as_expected = done["ended"] == expected(faults)[: len(done["ended"])]
        told = {key: done[key] for key in ("code", "ended", "resumed", "seconds")}
        return {
            "run": number,
            "faults": faults,
            "identical": same,
            "leftovers": leftovers(folder / "run") if done["code"] == 0 else [],
            **told,
            **({} if same and as_expected else {"said": done["said"]}),
        }
    finally:
        shutil.rmtree(folder)
