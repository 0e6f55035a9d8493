"""Training steps side by side: `python -m benchmarks.training [key=value]… [--rounds 3] [--peers …]`.

Every side runs in a process of its own, in interleaved rounds, at the same shapes, batch, precision, optimizer and threads.
Prints a table of medians, and writes it to `--out` with everything measured.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax

from benchmarks.record import idle, write
from benchmarks.task import Task
from llama_eqx import load_config
from llama_eqx.flops import PEAK_FLOPS, flops_per_token

ROOT = pathlib.Path(__file__).resolve().parent.parent
# 8 layers of 256 with a vocabulary of 4,096: small enough for a laptop, large enough that matrix products take most of the time.
SMALL = ["model.dims.vocab=4096", "model.dims.layers=8", "model.dims.embed=256", "model.dims.heads=8", "model.dims.kv_heads=4"]
SMALL += ["model.dims.head_dim=32", "model.dims.mlp=704", "model.context=256", "train.batch_size=8", "train.seq_len=256"]
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_eqx": ("benchmarks.ours", {}),
    "bare_jax": ("benchmarks.peers.bare_jax", {}),
    "pytorch": ("benchmarks.peers.pytorch", {}),
    "pytorch_compile": ("benchmarks.peers.pytorch", {"compile": True}),
    "transformers": ("benchmarks.peers.huggingface", {}),
    "transformers_compile": ("benchmarks.peers.huggingface", {"compile": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml; without any, the small model")
    parser.add_argument("--peers", nargs="*", default=[side for side in SIDES if side != "llama_eqx"], choices=SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--options", type=json.loads, default={}, help='JSON by side: {"bare_jax": {"remat": "dots"}}')
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--loaded", action="store_true", help="run on a busy machine too: to try the script, not for numbers")
    arguments = parser.parse_args()

    load = idle(arguments.loaded)
    overrides = arguments.overrides or SMALL
    config = load_config(*overrides)
    kinds = {("float32", "float32"): "float32", ("float32", "bfloat16"): "mixed", ("bfloat16", "bfloat16"): "bfloat16"}
    dims, rotary = config.model.dims, config.model.rotary
    task = {
        "dims": {name: getattr(dims, name) for name in ("vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp")},
        "theta": rotary.theta,
        "tied": config.model.tied,
        "batch": config.train.batch_size,
        "seq": config.train.seq_len,
        "precision": kinds[config.precision.params, config.precision.compute],
        "device": arguments.device,
        "threads": arguments.threads,
        "steps": arguments.steps,
    }
    jax.config.update("jax_platforms", "cpu")  # leaves a GPU's memory to the processes that this one starts
    flops = flops_per_token(eqx.filter_eval_shape(lambda key: config.model.build(key=key), jax.random.key(0)), task["seq"])

    sides = ["llama_eqx", *arguments.peers]
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(arguments.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            module, options = SIDES[side]
            options = {**options, **arguments.options.get(side, {})}
            if side == "llama_eqx":
                options["overrides"] = overrides
            answer = measured(module, Task(**task, options=options))
            if answer is not None:
                answers[side].append(answer)
                print(f"round {number + 1}  {side:22}{answer['tokens_per_second']:14,.0f} tokens/s", flush=True)

    kind = answers["llama_eqx"][0]["device_kind"] if answers["llama_eqx"] else ""
    lines = table(answers, flops, PEAK_FLOPS.get(kind))
    write(arguments.out, {"task": task, "overrides": overrides, "flops_per_token": flops._asdict(), "answers": answers}, lines, load, kind)


def measured(module: str, task: Task) -> dict[str, Any] | None:
    """Returns the answer of one side. If the side fails, prints its error and returns None."""
    command = [sys.executable, "-m", module, json.dumps(vars(task))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{module} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(lines[-1])


def table(answers: dict[str, list[dict[str, Any]]], flops: Any, peak: float | None) -> str:
    """Returns the medians over the rounds as Markdown. The ratio is ours over theirs."""
    speeds = {side: [answer["tokens_per_second"] for answer in found] for side, found in answers.items() if found}
    ours = statistics.median(speeds.get("llama_eqx", [float("nan")]))
    lines = ["| side | tokens/s | spread | ours / this | TFLOP/s (causal) | MFU | compile s | peak RSS MiB |", "|---|" + "---|" * 7]
    for side, rates in speeds.items():
        rate = statistics.median(rates)
        used = f"{rate * flops.causal / peak:.1%}" if peak else ""
        spread = max(rates) / min(rates) - 1
        compiling, memory = (statistics.median(answer[key] for answer in answers[side]) for key in ("compile_seconds", "peak_rss_mib"))
        numbers = (
            f"{rate:,.0f} | {spread:.1%} | {ours / rate:.3f} | {rate * flops.causal / 1e12:.3f} | {used} | {compiling:.1f} | {memory:,.0f}"
        )
        lines.append(f"| {side} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
