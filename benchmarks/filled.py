"""Milliseconds per token against the tokens in the cache, for several maxima: `python -m benchmarks.filled [--maxima …] [--out FILE]`.

The cost of a token should not depend on the maximum. Prints the median for each maximum over every 256 tokens of the cache, and plots all
times beside `--out`.
"""

import argparse
import pathlib
import statistics
import time

import jax

from benchmarks.decoding import MODELS
from benchmarks.record import idle, write
from llama_eqx import build_model, load_config
from llama_eqx.generation.layout import for_decoding
from llama_eqx.generation.stream import stream_tokens

PART = 256  # tokens over which a median is taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="27m", choices=MODELS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--maxima", nargs="*", type=int, default=[512, 1024, 2048])
    parser.add_argument("--every", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--loaded", action="store_true", help="run on a busy machine too: to try the script, not for numbers")
    arguments = parser.parse_args()
    load = idle(arguments.loaded)
    dims = [f"model.dims.{name}={size}" for name, size in MODELS[arguments.model].items()]
    config = load_config(*dims, f"model.context={max(arguments.maxima) + 16}", "train.seq_len=16")
    model = for_decoding(build_model(config.model, key=jax.random.key(0)))
    prompts, curves = [[1] * 16] * arguments.batch, {}

    def times(maximum: int) -> list[tuple[int, float]]:
        found, begun, filled = [], time.perf_counter(), 16
        for part in stream_tokens(model, prompts, maximum, every=arguments.every):
            now = time.perf_counter()
            filled += len(part[0])
            found.append((filled, 1e3 * (now - begun) / len(part[0])))
            begun = now
        return found[1:]  # the first includes the prompt

    for maximum in arguments.maxima:
        times(maximum)  # compiles
        curves[maximum] = times(maximum)
    starts = range(0, max(arguments.maxima), PART)
    lines = ["| up to | " + " | ".join(f"ms per token at {start} to {start + PART}" for start in starts) + " |"]
    lines += ["|---" * (len(starts) + 1) + "|"]
    for maximum, curve in curves.items():
        parts = [[ms for filled, ms in curve if start < filled <= start + PART] for start in starts]
        lines.append(f"| {maximum} | " + " | ".join(f"{statistics.median(part):.2f}" if part else "" for part in parts) + " |")
    if arguments.out:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for maximum, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), label=f"up to {maximum}", alpha=0.8)
        axes.set(xlabel="tokens in the cache", ylabel="ms per token", title=f"{arguments.model}, batch {arguments.batch}")
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(arguments.out.with_suffix(".png"), dpi=110)
        lines += ["", f"![milliseconds per token]({arguments.out.stem}.png)"]
    found = {"model": arguments.model, "batch": arguments.batch, "ms_per_token": curves}
    write(arguments.out, found, "\n".join([f"{arguments.model}, batch {arguments.batch}", "", *lines]), load)


if __name__ == "__main__":
    main()
