"""Measures what this machine can do at best: `python -m benchmarks.machine [--rounds 5] [--out benchmarks/results/machine.json]`.

Times copies in memory, a file written through to the disk and read back from the page cache, and the matrix products of a step of
`benchmarks.training`, each alone. A step cannot be faster than the sum of its products. XLA and PyTorch compute the same products in turn,
in float32, on all cores.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.record import idle, write

D = {"vocab": 4096, "layers": 8, "embed": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "mlp": 704, "batch": 8, "seq": 256}
TOKENS = D["batch"] * D["seq"]


def products() -> dict[str, tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Returns the shapes [..., m, k] and [..., k, n] of the products of a step, forward and backward, and the number of each.

    Attention is counted in full, including the half that the causal mask makes unnecessary.
    """
    d = D
    inner, kv, groups = d["heads"] * d["head_dim"], d["kv_heads"] * d["head_dim"], (d["batch"] * d["heads"],)
    weights = {"q and output": (d["embed"], inner, 2), "k and v": (d["embed"], kv, 2), "feed-forward": (d["embed"], d["mlp"], 3)}
    found = {}
    for name, (rows, columns, count) in weights.items():
        found[name, "forward"] = ((TOKENS, rows), (rows, columns), count * d["layers"])
        found[name, "of input"] = ((TOKENS, columns), (columns, rows), count * d["layers"])
        found[name, "of weight"] = ((rows, TOKENS), (TOKENS, columns), count * d["layers"])
    scores, values = (*groups, d["seq"], d["head_dim"]), (*groups, d["seq"], d["seq"])
    found["attention", "from heads"] = (scores, (*groups, d["head_dim"], d["seq"]), 2 * d["layers"])
    found["attention", "to heads"] = (values, scores, 4 * d["layers"])
    found["head", "forward"] = ((TOKENS, d["embed"]), (d["embed"], d["vocab"]), 1)
    found["head", "of input"] = ((TOKENS, d["vocab"]), (d["vocab"], d["embed"]), 1)
    found["head", "of weight"] = ((d["embed"], TOKENS), (TOKENS, d["vocab"]), 1)
    return {" ".join(key): value for key, value in found.items()}


def seconds(run: Callable[[], object], repeats: int) -> float:
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begun) / repeats


def multiplied(rounds: int) -> list[dict]:
    import jax
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    rng, product, found = np.random.default_rng(0), jax.jit(jax.numpy.matmul), []
    for name, (left, right, count) in products().items():
        a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in (left, right))
        flops = 2 * float(np.prod(left)) * right[-1]
        x, y = jax.numpy.asarray(a), jax.numpy.asarray(b)
        s, t = torch.from_numpy(a), torch.from_numpy(b)
        ways = {
            "xla": lambda x=x, y=y: product(x, y).block_until_ready(),
            "pytorch": lambda s=s, t=t: s @ t,
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            for way, run in ways.items():
                spent = seconds(run, repeats=3)
                if turn:  # the first compiles
                    times[way].append(spent)
        medians = {way: statistics.median(spent) for way, spent in times.items()}
        found.append({"name": name, "shapes": [left, right], "count": count, "gflop": flops / 1e9, "seconds": medians})
    return found


def copied(megabytes: int = 512) -> float:
    """Returns GB/s of a copy, counting its bytes once."""
    source = np.ones(megabytes << 17)
    target = np.zeros_like(source)
    return source.nbytes / statistics.median(seconds(lambda: np.copyto(target, source), 1) for _ in range(5)) / 1e9


def on_disk(megabytes: int = 512) -> tuple[float, float]:
    """Returns GB/s of writing with fsync, and of reading from the page cache."""
    content, rates = os.urandom(megabytes << 20), []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "file")
        for _ in range(3):
            begun = time.perf_counter()
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            written = time.perf_counter() - begun
            rates.append((len(content) / written / 1e9, len(content) / seconds(path.read_bytes, 1) / 1e9))
            path.unlink()
    return statistics.median(rate for rate, _ in rates), statistics.median(rate for _, rate in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--loaded", action="store_true", help="run on a busy machine too: to try the script, not for numbers")
    arguments = parser.parse_args()
    busy = idle(arguments.loaded)
    copying, (writing, reading), found = copied(), on_disk(), multiplied(arguments.rounds)
    lines = ["| products of a training step | of them | GFLOP/s by XLA | by PyTorch | XLA / PyTorch |", "|---|---|---|---|---|"]
    for each in found:
        xla, torch = (each["gflop"] / each["seconds"][way] for way in ("xla", "pytorch"))
        lines.append(f"| {each['name']} | {each['count']} | {xla:.0f} | {torch:.0f} | {xla / torch:.2f} |")
    steps = {way: sum(each["count"] * each["seconds"][way] for each in found) for way in ("xla", "pytorch")}
    most = {way: TOKENS / spent for way, spent in steps.items()}
    lines.append(
        f"| tokens/s if nothing else took time | | {most['xla']:,.0f} | {most['pytorch']:,.0f} | {most['xla'] / most['pytorch']:.2f} |"
    )
    lines += ["", f"Memory is copied at {copying:.1f} GB/s, written through to the disk at {writing:.2f}, read back at {reading:.1f}."]
    measured = {"products": found, "tokens_per_second": most, "copy_gb_s": copying, "write_gb_s": writing, "read_gb_s": reading}
    write(arguments.out, measured, "\n".join(lines), busy)


if __name__ == "__main__":
    main()
