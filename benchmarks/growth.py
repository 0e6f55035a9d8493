"""Measures how costs grow: `python -m benchmarks.growth [compile again warm context resume start] [--out benchmarks/results/growth.json]`.

    compile   seconds to trace and compile the training step, by the number of layers, which run in one scan
    again     the same in a new process that finds the program in the compile cache
    warm      the same as a share of the first time, for a step of a real size: llama2_7b's, split over 8 virtual devices, by layers
    context   training tokens a second, by the tokens of a row, with the same number of tokens per batch
    resume    seconds from the command to the first new step, by the steps that the run has behind it
    start     seconds from opening an index to its first batch of packed rows, by the tokens of the corpus (sparse files)

Prints a table, and plots the curves beside `--out`. `benchmarks.filled` measures the time of a token by the filled part of the cache, and
`benchmarks.plan` the memory of a device by the number of devices.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.record import idle, write
from benchmarks.startup import first_step
from benchmarks.task import Task
from benchmarks.training import measured

SIZES = {"vocab": 4096, "layers": 4, "embed": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "mlp": 704}
TINY = ["tokenizer=bytes", "data.validation_fraction=0.0005", "model.dims.layers=1", "train.batch_size=2", "train.seq_len=16"]
TINY += ["train.eval_every=100000", "train.sample_tokens=0", "checkpoint.every=100000", "tracking.wandb.mode=disabled"]


def trained(layers: int, seq: int, tokens: int = 2048) -> dict[str, float]:
    """Returns the measurements of a few training steps of `tokens` tokens in rows of `seq`, made in a process of their own."""
    dims, batch = {**SIZES, "layers": layers}, tokens // seq
    overrides = [*(f"model.dims.{name}={size}" for name, size in dims.items()), f"model.context={seq}"]
    overrides += [f"train.batch_size={batch}", f"train.seq_len={seq}"]
    options = {"overrides": overrides}
    task = Task(dims, 1e4, False, batch, seq, "float32", "cpu", os.cpu_count() or 1, steps=3, warmup=1, options=options)
    if (answer := measured("benchmarks.ours", task)) is None:
        raise SystemExit(1)
    return answer


def compiling(layers: int, folder: str) -> float:
    return trained(layers, 128, 256)["compile_seconds"]


def again(layers: int, folder: str) -> float:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
    try:
        compiling(layers, folder)
        return compiling(layers, folder)
    finally:
        del os.environ["JAX_COMPILATION_CACHE_DIR"]


def warm(layers: int, folder: str) -> float:
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled-{time.time_ns()}"}
    overrides = ["model=llama2_7b", f"model.dims.layers={layers}", "mesh=cpu-8", "train.batch_size=8", f"run_dir={folder}/plan"]
    seconds = []
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "llama_eqx.plan", *overrides], check=True, capture_output=True, env={**os.environ, **cache})
        compiler = json.loads(pathlib.Path(folder, "plan", "plan.json").read_text())["compiler"]
        seconds.append(compiler["lower_seconds"] + compiler["compile_seconds"])
    return seconds[1] / seconds[0]


def context(seq: int, folder: str) -> float:
    return trained(4, seq, 4096)["tokens_per_second"]


def resuming(steps: int, folder: str) -> float:
    """Returns the seconds to the first new step. The run is made once for all rounds, and each round resumes a copy of it."""
    made, again = pathlib.Path(folder, f"run-{steps}"), pathlib.Path(folder, f"again-{time.time_ns()}")
    if not made.exists():
        command = [sys.executable, "-m", "llama_eqx.train", f"run_dir={made}", f"train.steps={steps}", "train.log_every=1", *TINY]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "LLAMA_EQX_CACHE": folder})
    shutil.copytree(made, again)
    return first_step(folder, f"run_dir={again}", f"train.steps={steps + 1000}", *TINY)


def starting(tokens: int, folder: str) -> float:
    from benchmarks.data.pipeline import dataset

    prepared = dataset(tokens, sparse=True)
    code = f"from benchmarks.data.pipeline import started; started({str(prepared)!r}, 2048, 64, 'packed')"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])["batch_s"]


CURVES = {
    "compile": (compiling, [1, 2, 4, 8, 16, 32], "layers", "seconds to compile a step"),
    "again": (again, [1, 32], "layers", "seconds to compile it again"),
    "warm": (warm, [8, 32, 80], "layers of llama2_7b", "compiling again, of the first time"),
    "context": (context, [128, 256, 512, 1024, 2048, 4096], "tokens of a row", "training tokens/s"),
    "resume": (resuming, [10, 100, 1000, 10_000], "steps behind it", "seconds to the first new step"),
    "start": (starting, [10**7, 10**8, 10**9, 10**10], "tokens of the corpus", "seconds to the first batch"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(CURVES), help="; ".join(CURVES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--loaded", action="store_true", help="run on a busy machine too: to try the script, not for numbers")
    arguments = parser.parse_args()
    busy = idle(arguments.loaded)
    found: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # W&B's process outlives a killed run, and writes there
        for what in arguments.what:
            measure, points, _, _ = CURVES[what]
            found[what] = {point: [] for point in points}
            for _ in range(arguments.rounds):
                for point in points:
                    found[what][point].append(measure(point, folder))
                    print(f"{what} {point:,}: {found[what][point][-1]:,.2f}", file=sys.stderr, flush=True)
    lines = ["| what | by | median | range |", "|---|---|---|---|"]
    for what, points in found.items():
        _, _, by, unit = CURVES[what]
        for point, values in points.items():
            lines.append(f"| {unit} | {point:,} {by} | {statistics.median(values):,.2f} | {min(values):,.2f} to {max(values):,.2f} |")
    if arguments.out:
        draw(found, arguments.out.with_suffix(".png"))
        lines.append(f"\n![how costs grow]({arguments.out.stem}.png)")
    write(arguments.out, {"found": found}, "\n".join(lines), busy)


def draw(found: dict[str, dict[int, list[float]]], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 3.4), layout="constrained")
    for axes, (what, points) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        _, _, by, unit = CURVES[what]
        medians = [statistics.median(values) for values in points.values()]
        axes.plot(list(points), medians, marker="o")
        axes.fill_between(list(points), [min(values) for values in points.values()], [max(values) for values in points.values()], alpha=0.2)
        axes.set(xscale="log", xlabel=by, title=unit)
        axes.set_xticks(list(points), [f"{point:,}" if point < 10**6 else f"{point:.0e}" for point in points], rotation=45)
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
