"""Measures what W&B costs a run while it is up, and while it is down in five ways.

    python benchmarks/faults/wandb_down.py [WAY…]      prints a table, and writes wandb_down.json beside this file

A loop makes 100 steps of 50 ms of arithmetic on one core and records each step, so that W&B stays open during the loop. Reports the time
until the first step, the median and worst cost of a record, the time of a step with its record, and the time from the last step to the end.
Every way is compared with a loop without W&B just before it.
"""

import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "tests" / "tracking")]
os.environ |= {"JAX_PLATFORMS": "cpu", "WANDB_API_KEY": "0" * 40, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import jax
import numpy as np
from wandb_server import Server

from llama_eqx import load_config
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.tracker import Tracker

STEPS, STEP = 100, 0.05
WAYS = ["offline", "online", "closed port", "dies", "black hole", "500", "finish hangs"]
RESULT = HERE / "wandb_down.json"


def work(times: int) -> float:
    """Returns the seconds of this many matrix products."""
    begun = time.perf_counter()
    for _ in range(times):
        _ = MATRIX @ MATRIX
    return time.perf_counter() - begun


MATRIX = np.ones((256, 256), np.float32)
TIMES = max(1, round(STEP / statistics.median(work(1) for _ in range(200))))


def measured(way: str) -> dict[str, float]:
    server = Server({"black hole": "silent", "500": "500"}.get(way, "up"))
    os.environ["WANDB_BASE_URL"] = server.url
    if way == "closed port":
        server.die()
    mode = way if way in ("disabled", "offline") else "online"
    config = load_config(f"tracking.wandb.mode={mode}").tracking
    with tempfile.TemporaryDirectory() as folder:
        begun, costs, spent = time.perf_counter(), [], []
        tracker = Tracker(config, folder, settings={}, steps=STEPS, start=0)
        started = time.perf_counter() - begun
        for step in range(1, STEPS + 1):
            worked = work(TIMES)
            if step == STEPS // 2 and way == "dies":
                server.die()
            if step == STEPS - 1 and way == "finish hangs":
                server.state = "silent"
            begun = time.perf_counter()
            tracker.log(step, {"train/loss": 1 / step, "optim/lr": 1e-3, "perf/tokens_per_second": 1e5})
            costs.append(time.perf_counter() - begun)
            spent.append(worked + costs[-1])
        begun = time.perf_counter()
        tracker.close()
        ended = time.perf_counter() - begun
        assert len(read_metrics(pathlib.Path(folder, "metrics.jsonl"))) == STEPS
        time.sleep(1)  # for processes that outlive the tracker
    if way not in ("closed port", "dies"):
        server.die()
    return {
        "start_s": started,
        "record_median_us": 1e6 * statistics.median(costs),
        "record_worst_us": 1e6 * max(costs),
        "step_ms": 1e3 * statistics.median(spent),
        "end_s": ended,
    }


def main(ways: list[str]) -> None:
    jax.devices()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for way in ways:
        without, found = measured("disabled"), measured(way)
        results[way] = {**found, "without_step_ms": without["step_ms"], "without_record_median_us": without["record_median_us"]}
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print("| W&B | start, s | record, median, us | at worst, us | step, ms | without, ms | end, s |")
    print("|---|---|---|---|---|---|---|")
    for way, found in results.items():
        print(
            f"| {way} | {found['start_s']:.2f} | {found['record_median_us']:.0f} | {found['record_worst_us']:.0f} | "
            f"{found['step_ms']:.2f} | {found['without_step_ms']:.2f} | {found['end_s']:.2f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or WAYS)
