"""python tests/faults/soak.py FOLDER STEPS [SECONDS]: one run through a fault every SECONDS (20) on average, against one left alone.

It goes on where it was stopped, and prints in the end what becomes `benchmarks/faults/soak.json`. Goodput is the time of the run that was
left alone over that of the other, starts included. The run is started again at once, where `supervise` would wait longer and longer.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from harness import HERE, SETTINGS, Outcome, environment, leftovers, outcome

sys.path.insert(0, str(HERE.parents[1]))
from llama_eqx.checkpoint.restore import steps
from llama_eqx.tracking.jsonl import read_metrics

# Steps of a tenth of a second or two on a busy core, and a checkpoint of 10 MB every 20 of them.
SIZES = {"layers": 4, "embed": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 352}
OURS = {f"model.dims.{axis}": size for axis, size in SIZES.items()} | {
    "train.batch_size": 2,
    "train.seq_len": 128,
    "train.eval_every": 250,
    "checkpoint.every": 20,
}
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
GOES_ON = {0, 75, 130, 6, -signal.SIGKILL, *(-number for number in STOPS)}  # 6: two saves in a row found the disk full
Fault = Callable[[subprocess.Popen, pathlib.Path, random.Random], None]


def killed(child: subprocess.Popen, run_dir: pathlib.Path, chance: random.Random) -> None:
    child.kill()


def killed_while_it_saves(child: subprocess.Popen, run_dir: pathlib.Path, chance: random.Random) -> None:
    while child.poll() is None and not list(run_dir.glob("checkpoints/*.unfinished*")):
        time.sleep(0.001)
    child.kill()


def told_to_stop(child: subprocess.Popen, run_dir: pathlib.Path, chance: random.Random) -> None:
    child.send_signal(chance.choice(STOPS))


def killed_and_a_bit_flipped(child: subprocess.Popen, run_dir: pathlib.Path, chance: random.Random) -> None:
    child.kill()
    child.wait()
    if file := _of_the_newest(run_dir, chance):
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)


def killed_and_a_file_cut(child: subprocess.Popen, run_dir: pathlib.Path, chance: random.Random) -> None:
    child.kill()
    child.wait()
    if file := _of_the_newest(run_dir, chance):
        os.truncate(file, chance.randrange(file.stat().st_size))


def frozen(child: subprocess.Popen, run_dir: pathlib.Path, chance: random.Random) -> None:
    child.send_signal(signal.SIGSTOP)
    time.sleep(3)
    child.send_signal(signal.SIGCONT)


def a_second_writer(child: subprocess.Popen, run_dir: pathlib.Path, chance: random.Random) -> None:
    command, _ = _command(run_dir)
    while child.poll() is None and f'"pid": {child.pid},' not in _lock(run_dir):
        time.sleep(0.05)
    second = subprocess.run(command, env=environment(run_dir.parent), capture_output=True, text=True, check=False)
    assert second.returncode == 2 or child.poll() is not None, second.stderr


def no_room_for_a_save(child: subprocess.Popen, run_dir: pathlib.Path, chance: random.Random) -> None:
    """No file of more than a megabyte, until a save has failed."""
    soft, hard = resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    seen = len(_said(run_dir))
    while child.poll() is None and "could not be saved" not in _said(run_dir)[seen:]:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (soft, hard))


FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        killed,
        killed_while_it_saves,
        told_to_stop,
        killed_and_a_bit_flipped,
        killed_and_a_file_cut,
        frozen,
        a_second_writer,
        no_room_for_a_save,
    )
}


def _of_the_newest(run_dir: pathlib.Path, chance: random.Random) -> pathlib.Path | None:
    """A file of the newest checkpoint, if there is another one to go back to."""
    saved = steps(run_dir / "checkpoints")
    files = sorted(path for path in (run_dir / f"checkpoints/{saved[-1]}").rglob("*") if path.is_file()) if saved[1:] else []
    return chance.choice([file for file in files if file.stat().st_size]) if files else None


def _lock(run_dir: pathlib.Path) -> str:
    return (run_dir / ".writer").read_text() if (run_dir / ".writer").exists() else ""


def _command(run_dir: pathlib.Path) -> tuple[list[str], pathlib.Path]:
    """And where what it says goes to."""
    settings = {**SETTINGS, **OURS, "train.steps": int(sys.argv[2]), "run_dir": run_dir}
    return [sys.executable, "-m", "llama_eqx.train", *(f"{key}={value}" for key, value in settings.items())], run_dir.with_suffix(".said")


def _said(run_dir: pathlib.Path) -> str:
    return _command(run_dir)[1].read_text(errors="replace")


def start(run_dir: pathlib.Path) -> subprocess.Popen:
    command, said = _command(run_dir)
    with said.open("a") as file:
        return subprocess.Popen(command, env=environment(run_dir.parent), stdout=subprocess.DEVNULL, stderr=file)


def alone(folder: pathlib.Path) -> tuple[Outcome, float]:
    """What becomes of a run that is left alone, and in how many seconds once its programs are compiled."""
    known = folder / "alone.json"
    if not known.exists():
        begun = time.monotonic()
        child = start(folder / "alone")
        assert child.wait() == 0, _said(folder / "alone")
        known.write_text(json.dumps([*outcome(folder / "alone"), time.monotonic() - begun]))
    *found, seconds = json.loads(known.read_text())
    return Outcome(*found), seconds


def soak(folder: pathlib.Path, every: float) -> list[dict]:
    """A line in `soak.jsonl` for each fault, and one for the end."""
    run_dir, log = folder / "soaked", folder / "soak.jsonl"
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def tell(**line: object) -> None:
        nonlocal begun
        now = time.monotonic()
        known.append({**line, "seconds": round(now - begun, 2)})
        begun = now
        with log.open("a") as file:
            file.write(json.dumps(known[-1]) + "\n")

    begun = time.monotonic()
    while not known or known[-1].get("code") != 0:
        child, code = start(run_dir), None
        while code is None:
            chance = random.Random(len(known))
            name = chance.choice(list(FAULTS))
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(chance.expovariate(1 / every))
            if code is None:
                FAULTS[name](child, run_dir, chance)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = child.wait(60 if name.startswith(("killed", "told")) else 0.5)
                tell(fault=name, code=code)
            else:
                tell(code=code)
        assert code in GOES_ON, _said(run_dir)[-3000:]
    return known


def main(folder: pathlib.Path, every: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    expected, undisturbed = alone(folder)
    known = soak(folder, every)
    said, spent = _said(folder / "soaked"), sum(line["seconds"] for line in known)
    faults = [line["fault"] for line in known if "fault" in line]
    saves = [float(seconds) for seconds in re.findall(r"saved step \d+: .* in ([\d.]+) s", said)]
    step = undisturbed / len([record for record in read_metrics(folder / "alone/metrics.jsonl") if "train/loss" in record])
    between, cost = spent / max(len(faults), 1), sum(saves) / max(len(saves), 1)
    result = {
        "identical": outcome(folder / "soaked") == expected,
        "leftovers": [name for name in leftovers(folder / "soaked") if not name.endswith(".damaged")],
        "steps": int(sys.argv[2]),
        "seconds_alone": round(undisturbed, 1),
        "seconds": round(spent, 1),
        "goodput": round(undisturbed / spent, 3),
        "faults": dict(collections.Counter(faults)),
        "starts": len(re.findall(r"run_dir=", said)),
        "resumed": len(re.findall(r"resumed from step", said)),
        "damaged_checkpoints_noticed": len(re.findall(r"is damaged", said)),
        "failed_saves": len(re.findall(r"could not be saved", said)),
        "seconds_between_faults": round(between, 1),
        "seconds_between_saves": round(OURS["checkpoint.every"] * step, 2),
        "seconds_of_a_save": round(cost, 2),
        "youngs_interval": round(math.sqrt(2 * cost * between), 2),
    }
    print(json.dumps(result, indent=1))
    assert result["identical"]
    assert not result["leftovers"]


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), float(sys.argv[3]) if len(sys.argv) > 3 else 20.0)
