"""Greedy decoding side by side: `python -m benchmarks.decoding [--models 27m 110m] [--batches 1 8] [--peers …] [--out FILE]`.

Every side runs in a process of its own, in interleaved rounds, on random weights and prompts of the same shapes. The rate is that of the
tokens after the first: what `new` tokens take longer than one. Prints a table and writes it, with everything measured, to `--out`, where
further rounds are added to those that are there.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
from typing import Any

from benchmarks.record import idle, write
from benchmarks.task import Task
from benchmarks.training import measured

MODELS = {
    "smoke": {"vocab": 256, "layers": 2, "embed": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 176},
    "27m": {"vocab": 8192, "layers": 8, "embed": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "mlp": 1408},
    "110m": {"vocab": 32000, "layers": 12, "embed": 768, "heads": 12, "kv_heads": 12, "head_dim": 64, "mlp": 2048},
}
TIED = {"110m"}
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_eqx": ("benchmarks.decoding_ours", {}),
    "llama_eqx, stacked": ("benchmarks.decoding_ours", {"stacked": True}),
    "transformers": ("benchmarks.peers.huggingface_decoding", {}),
    "transformers, static": ("benchmarks.peers.huggingface_decoding", {"static": True}),
    "pytorch": ("benchmarks.peers.pytorch_decoding", {}),
    "pytorch, compiled": ("benchmarks.peers.pytorch_decoding", {"compile": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["27m", "110m"], choices=MODELS)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--peers", nargs="*", default=["transformers", "pytorch, compiled"], choices=SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="measurements in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--loaded", action="store_true", help="run on a busy machine too: to try the script, not for numbers")
    arguments = parser.parse_args()
    load = idle(arguments.loaded)

    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "models", "batches", "rounds", "loaded")}
    before = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {"settings": settings, "records": []}
    if before["settings"] != settings:
        sys.exit(f"{arguments.out} was measured otherwise: {before['settings']}\nnext: another --out")
    sides, records = ["llama_eqx", *arguments.peers], before["records"]
    for model in arguments.models:
        for batch in arguments.batches:
            record = next((record for record in records if (record["model"], record["batch"]) == (model, batch)), None)
            if record is None:
                records.append(record := {"model": model, "batch": batch, "answers": {side: [] for side in sides}})
            answers = record["answers"]
            for _ in range(arguments.rounds):
                number = len(answers["llama_eqx"])
                for side in sides if number % 2 == 0 else reversed(sides):
                    module, options = SIDES[side]
                    task = Task(
                        dims=MODELS[model],
                        theta=10000.0,
                        tied=model in TIED,
                        batch=batch,
                        seq=arguments.prompt + arguments.new,
                        precision=arguments.precision,
                        device=arguments.device,
                        threads=arguments.threads,
                        steps=arguments.steps,
                        options={**options, "prompt": arguments.prompt, "new": arguments.new},
                    )
                    if answer := measured(module, task):
                        answers[side].append(answer)
                        print(
                            f"{model} batch {batch}  round {number + 1}  {side:22}{answer['tokens_per_second']:10,.1f} tokens/s", flush=True
                        )
    lines = table(records)
    write(arguments.out, {"settings": settings, "records": records}, lines, load, arguments.device)


def table(records: list[dict[str, Any]]) -> str:
    """Medians over the rounds; the ratio is ours over theirs."""
    lines = ["| model | batch | side | tokens/s | spread | GB/s of weights | ours / this |", "|---|---|---|---|---|---|---|"]
    for record in records:
        medians = {
            side: statistics.median(answer["tokens_per_second"] for answer in found) for side, found in record["answers"].items() if found
        }
        for side, rate in medians.items():
            found = record["answers"][side]
            rates = [answer["tokens_per_second"] for answer in found]
            bandwidth = statistics.median(answer["weight_gb_per_second"] for answer in found)
            numbers = f"{rate:,.1f} | {max(rates) / min(rates) - 1:.1%} | {bandwidth:.1f} | {medians.get('llama_eqx', 0) / rate:.2f}"
            lines.append(f"| {record['model']} | {record['batch']} | {side} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
