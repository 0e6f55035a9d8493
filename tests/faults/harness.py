"""Runs that are killed, started again by supervise, and compared with one that was left alone."""

import contextlib
import hashlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
TEXT = HERE.parent / "golden" / "text.md"
STEPS, EVERY = 12, 3
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
KILLED, STOPPED = 300, 50  # trials


class Outcome(NamedTuple):
    """What must be the same: the SHA-256 of every array, the records of every step, and how far the data is."""

    leaves: dict[str, str]
    records: list[dict[str, Any]]
    progress: dict[str, int]


class Trial(NamedTuple):
    """`faults` for the starts one after another; `kill_after` seconds an outside killer waits, `when_saving` from when a save is on
    its way.
    """

    faults: str
    kill_after: float | None = None
    when_saving: bool = False


def trial(number: int, seconds: float) -> Trial:
    """The same for the same number: of 350, the last 50 are told to stop and the others killed. `seconds` an undisturbed run takes."""
    chance = random.Random(number)
    if number >= KILLED:
        label = chance.choice(
            ("compile", "step:1", f"step:{chance.randint(2, STEPS)}", "evaluate:1", "evaluate:2", "save:1", "save:2", "save:3")
        )
        return Trial(f"{label}{':1' * (':' not in label)}:SIGTERM")
    match number % 10:
        case 0 | 1:
            return Trial("", chance.uniform(0, 0.05), when_saving=True)
        case 2:
            return Trial(f"save:{chance.randint(1, 4)}")
        case 3:
            return Trial(f"finalise:{chance.randint(1, 4)}")
        case 4:
            return Trial(f"{chance.choice(('manifest', 'rename'))}:{chance.randint(1, 4)}")
        case 5:
            return Trial(f"remove:{chance.randint(1, 2)}")
        case 6:
            return Trial(chance.choice(("compile", "step", f"step:{chance.randint(2, STEPS)}")))
        case 7:
            return Trial(f"evaluate:{chance.randint(1, 3)}")
        case 8:
            return Trial(f"{chance.choice(('save:2', 'finalise:2', 'evaluate:2'))};restore")
        case _:
            return Trial("", chance.uniform(0, seconds))


def environment(cache: pathlib.Path) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
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


def run(run_dir: pathlib.Path, server: str, trial: Trial) -> dict[str, Any]:
    """Trains to the end under supervise through the faults of a trial. What is returned says how that went."""
    log = run_dir.with_name(f"{run_dir.name}.starts")
    start = [sys.executable, "-I", "-S", str(HERE / "nth_start.py"), server, trial.faults, str(log), *command(run_dir)]
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_eqx.supervise", "--", *start],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if trial.kill_after is not None:
        threading.Thread(target=_kill, args=(log, run_dir, trial), daemon=True).start()
    _, said = process.communicate(timeout=300)
    resumed = [int(step) for step in re.findall(r"resumed from step (\d+)", said)]
    ended = re.findall(r"supervise: ended by ([\w ]+): restart", said)
    return {
        "code": process.returncode,
        "said": said,
        "resumed": resumed,
        "ended": ended,
        "starts": len(log.read_text().splitlines()),
        "seconds": round(time.monotonic() - begun, 1),
    }


def _kill(log: pathlib.Path, run_dir: pathlib.Path, trial: Trial) -> None:
    """Kills the first start, if it is still there."""
    assert trial.kill_after is not None
    while not log.exists() or not log.read_text().endswith("\n"):
        time.sleep(0.01)
    pid = int(log.read_text().split()[0])
    if trial.when_saving:
        while not list(run_dir.glob("checkpoints/*.unfinished*")) and pathlib.Path(f"/proc/{pid}").exists():
            time.sleep(0.0005)
    time.sleep(trial.kill_after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def outcome(run_dir: pathlib.Path) -> Outcome:
    import numpy as np

    from llama_eqx.checkpoint.manifest import read_manifest
    from llama_eqx.checkpoint.restore import read_each, steps
    from llama_eqx.tracking.jsonl import read_metrics

    step = steps(run_dir / "checkpoints")[-1]
    folder = run_dir / "checkpoints" / str(step)
    arrays = {f"{part}.{name}": array for part in ("model", "training") for name, array in read_each(folder, part)}
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
    run(folder / "first", server, Trial(""))  # fills the cache of compiled programs
    done = run(folder / "run", server, Trial(""))
    assert done["code"] == 0, done["said"]
    found = outcome(folder / "run")
    assert [float.fromhex(record["step"]) for record in found.records if "train/loss" in record] == list(range(1, STEPS + 1))
    assert found.progress["step"] == STEPS
    assert outcome(folder / "first") == found  # the same command twice
    return Reference(found, done["seconds"], server)


def attempt(number: int, against: Reference) -> dict[str, Any]:
    """Runs trial `number` in a folder of its own and says what came of it; `identical` is what it is about."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"faults-{number}-"))
    drawn = trial(number, against.seconds)
    try:
        done = run(folder / "run", against.server, drawn)
        same = done["code"] == 0 and outcome(folder / "run") == against.outcome
        left = leftovers(folder / "run") if done["code"] == 0 else []
        told = {key: done[key] for key in ("code", "resumed", "ended", "starts", "seconds")}
        return {
            "trial": number,
            **drawn._asdict(),
            "identical": same,
            "leftovers": left,
            **told,
            **({} if same else {"said": done["said"]}),
        }
    finally:
        shutil.rmtree(folder)
