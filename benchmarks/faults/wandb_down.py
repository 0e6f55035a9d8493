"""What W&B costs a run while it is up, and while it is down in five ways.

    python benchmarks/faults/wandb_down.py            prints a table, and writes wandb_down.json beside this file

A loop of 100 steps of 50 ms, each of which is recorded, so that W&B stays open while it goes on. Reported are the time from nothing to the
first step, what a record costs, in the median and at worst, and the time from the last step to the end.
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
os.environ |= {"JAX_PLATFORMS": "cpu", "WANDB_API_KEY": "0" * 40}

import jax
from wandb_server import Server

from llama_eqx import load_config
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.tracker import Tracker

STEPS, STEP = 100, 0.05
WAYS = ["disabled", "offline", "online", "closed port", "dies", "black hole", "500", "finish hangs"]


def measured(way: str) -> dict[str, float]:
    server = Server({"black hole": "silent", "500": "500"}.get(way, "up"))
    os.environ["WANDB_BASE_URL"] = server.url
    if way == "closed port":
        server.die()
    mode = way if way in ("disabled", "offline") else "online"
    config = load_config(f"tracking.wandb.mode={mode}").tracking
    with tempfile.TemporaryDirectory() as folder:
        begun, costs = time.perf_counter(), []
        tracker = Tracker(config, folder, settings={}, steps=STEPS, start=0)
        started = time.perf_counter() - begun
        for step in range(1, STEPS + 1):
            time.sleep(STEP)
            if step == STEPS // 2 and way == "dies":
                server.die()
            if step == STEPS - 1 and way == "finish hangs":
                server.state = "silent"
            begun = time.perf_counter()
            tracker.log(step, {"train/loss": 1 / step, "optim/lr": 1e-3, "perf/tokens_per_second": 1e5})
            costs.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        tracker.close()
        ended = time.perf_counter() - begun
        assert len(read_metrics(pathlib.Path(folder, "metrics.jsonl"))) == STEPS
        time.sleep(1)  # for what is left to itself
    if way not in ("closed port", "dies"):
        server.die()
    return {"start_s": started, "record_median_us": 1e6 * statistics.median(costs), "record_worst_us": 1e6 * max(costs), "end_s": ended}


def main() -> None:
    jax.devices()
    results = {way: measured(way) for way in WAYS}
    (HERE / "wandb_down.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{'':14}{'start s':>10}{'record us':>12}{'worst us':>12}{'end s':>10}")
    for way, found in results.items():
        print(f"{way:14}{found['start_s']:10.2f}{found['record_median_us']:12.0f}{found['record_worst_us']:12.0f}{found['end_s']:10.2f}")


if __name__ == "__main__":
    main()
