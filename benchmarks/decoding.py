"""Greedy decoding side by side: `python -m benchmarks.decoding [--models 27m 110m] [--batches 1 8] [--peers …] [--out FILE]`.

Every side runs in a process of its own, in interleaved rounds, on random weights and prompts of the same shapes. The rate counts the tokens
after the first: their time is that of `new` tokens minus that of one. Prints a table and writes it, with everything measured, to `--out`,
where further rounds are added to those that are there.

On a card whose bandwidth is known, it also reports the share of the bandwidth that decoding uses and the share of the peak FLOP/s that the
prompt uses.
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
from llama_eqx.flops import PEAK_FLOPS

MODELS = {
    "smoke": {"vocab": 256, "layers": 2, "embed": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 176},
    "27m": {"vocab": 8192, "layers": 8, "embed": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "mlp": 1408},
    # As many parameters as 27m, with keys and values for every head or for one head: what experiments/attention compares.
    "27m_multi_head": {"vocab": 8192, "layers": 8, "embed": 512, "heads": 8, "kv_heads": 8, "head_dim": 64, "mlp": 1237},
    "27m_multi_query": {"vocab": 8192, "layers": 8, "embed": 512, "heads": 8, "kv_heads": 1, "head_dim": 64, "mlp": 1536},
    "110m": {"vocab": 32000, "layers": 12, "embed": 768, "heads": 12, "kv_heads": 12, "head_dim": 64, "mlp": 2048},
    "1b": {"vocab": 128256, "layers": 16, "embed": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "mlp": 8192},
    "8b": {"vocab": 128256, "layers": 32, "embed": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "mlp": 14336},
}
TIED = {"110m", "1b"}
# The memory bandwidth of a card in bytes/s, by JAX's device_kind, from the vendor's datasheets.
BANDWIDTH = {"NVIDIA A100-SXM4-80GB": 2.039e12, "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12}
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
    parser.add_argument("--chunk", type=int, help="tokens of the prompt that go through our model at a time; prefill_chunk unless given")
    parser.add_argument("--steps", type=int, default=3, help="measurements in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--loaded", action="store_true", help="run on a busy machine too: to try the script, not for numbers")
    arguments = parser.parse_args()
    load = idle(arguments.loaded)

    others = ("out", "models", "batches", "rounds", "loaded", *([] if arguments.chunk else ["chunk"]))
    settings = {name: value for name, value in vars(arguments).items() if name not in others}
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
                        options={**options, "prompt": arguments.prompt, "new": arguments.new, "chunk": arguments.chunk},
                    )
                    if answer := measured(module, task):
                        answers[side].append(answer)
                        print(
                            f"{model} batch {batch}  round {number + 1}  {side:22}{answer['tokens_per_second']:10,.1f} tokens/s", flush=True
                        )
    lines = "\n".join([table(records, settings), *shares(records, settings)])
    write(arguments.out, {"settings": settings, "records": records}, lines, load, arguments.device)


def table(records: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Returns the medians over the rounds as Markdown. The ratio is ours over theirs."""
    lines = ["| model | batch | side | tokens/s | spread | GB/s | prompt, ms | ours / this |", "|---|---|---|---|---|---|---|---|"]
    for record in records:
        medians = {side: median(found, "tokens_per_second") for side, found in record["answers"].items() if found}
        for side, rate in medians.items():
            found = record["answers"][side]
            rates = [answer["tokens_per_second"] for answer in found]
            bandwidth = bytes_per_step(record["model"], record["batch"], settings) / median(found, "step_seconds") / 1e9
            numbers = f"{rate:,.1f} | {max(rates) / min(rates) - 1:.1%} | {bandwidth:,.1f} | {1e3 * median(found, 'first_seconds'):,.1f}"
            lines.append(f"| {record['model']} | {record['batch']} | {side} | {numbers} | {medians.get('llama_eqx', 0) / rate:.2f} |")
    return "\n".join(lines)


def shares(records: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Returns a line for each of our rates: on a known card, the share of its bandwidth and of its peak FLOP/s."""
    lines = []
    for record in records:
        found = record["answers"]["llama_eqx"]
        kind = found[0]["device_kind"] if found else ""
        if kind not in BANDWIDTH:
            lines += [f"{kind}: what it can do is not known here"] if settings["device"] == "gpu" else []
            continue
        read = bytes_per_step(record["model"], record["batch"], settings) / median(found, "step_seconds")
        used = prompt_flops(record["model"], record["batch"], settings) / median(found, "first_seconds")
        lines.append(
            f"{record['model']}, batch {record['batch']}, on {kind}: a token reads at {read / 1e9:,.0f} GB/s, "
            f"{read / BANDWIDTH[kind]:.1%} of {BANDWIDTH[kind] / 1e12:.2f} TB/s; a prompt of {settings['prompt']} and the first token take "
            f"{1e3 * median(found, 'first_seconds'):,.1f} ms, {used / PEAK_FLOPS[kind]:.1%} MFU"
        )
    return ["", *lines] if lines else []


def median(found: list[dict[str, Any]], name: str) -> float:
    return statistics.median(answer[name] for answer in found)


def bytes_per_step(model: str, batch: int, settings: dict[str, Any]) -> float:
    """Bytes that a token has to read: the weights of the products, and the keys and values of the prompt and of half of `new`."""
    d, size = MODELS[model], 2 if settings["precision"] == "bfloat16" else 4
    cache = 2 * d["layers"] * d["kv_heads"] * d["head_dim"] * batch * (settings["prompt"] + settings["new"] / 2)
    return size * (d["layers"] * per_layer(model) + d["vocab"] * d["embed"] + cache)


def prompt_flops(model: str, batch: int, settings: dict[str, Any]) -> float:
    """FLOPs of the prompts: all their tokens in every layer, with causal attention, and one token of each prompt in the head."""
    d, prompt = MODELS[model], settings["prompt"]
    attention = 2 * d["heads"] * d["head_dim"] * prompt  # per token: 4 for each token that it reads, half of the prompt on average
    return batch * (prompt * d["layers"] * (2 * per_layer(model) + attention) + 2 * d["vocab"] * d["embed"])


def per_layer(model: str) -> int:
    """Returns the number of parameters in the products of a layer."""
    d = MODELS[model]
    return d["embed"] * d["head_dim"] * (2 * d["heads"] + 2 * d["kv_heads"]) + 3 * d["embed"] * d["mlp"]


if __name__ == "__main__":
    main()
