"""Measures how fast batches are made, what a start costs, and how memory develops.

    python -m benchmarks.data.pipeline speed [--tokens=50_000_000] [--batch=64] [--seq=2048] [--rounds=7]
    python -m benchmarks.data.pipeline start [--tokens=10_000_000_000]
    python -m benchmarks.data.pipeline memory [--tokens=50_000_000]
    python -m benchmarks.data.pipeline starvation [--steps=200]

The first line of the output states the conditions. Files are written under $TMPDIR.

`speed`: tokens a second of each kind of rows, in numpy, and of peers on the same ids, in turn in one process. Reports medians over the
rounds and their ratio to a bare gather of rows from the mapped file. Before each timing, as many batches as are timed are drawn, so that
none of the timed batches was made ahead.
`start`: seconds until the first batch, without the imports, and the growth of memory until the dataset is open and until the first batch.
The dataset has `--tokens` tokens (sparse files). Each kind of rows has a process of its own.
`memory`: the memory of the process over an epoch. `allocated` is its own. `resident` also counts the pages of mapped files, which the
system takes back when it needs them.
`starvation`: the share of the time that the default run waits for its batches, without its first step.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.peers.data import PEERS
from benchmarks.record import circumstances, idle

VOCAB, MEAN = 32_000, 700  # number of ids; mean tokens of a document


def dataset(tokens: int, *, sparse: bool = False, shard_tokens: int = 2**28) -> pathlib.Path:
    """Returns a folder of token shards, which is made once: random ids, or sparse files of zeros, in documents of geometric length."""
    from llama_eqx.data.shard import Shard, token_dtype
    from llama_eqx.data.shards import HEADER, ShardWriter, write_index
    from llama_eqx.data.tokenizer import BytesTokenizer

    folder = pathlib.Path(tempfile.gettempdir(), f"llama_eqx-benchmark-{tokens}{'-sparse' * sparse}")
    if (folder / "index.json").exists():
        return folder
    folder.mkdir(exist_ok=True)
    rng, shards, left = np.random.default_rng(0), [], tokens
    for number in itertools.count():
        size = min(left, shard_tokens) if number else min(100_000, tokens // 10)  # the first shard is held out
        lengths = np.minimum(rng.geometric(1 / MEAN, 2 * size // MEAN + 100), 2000)
        lengths = lengths[np.cumsum(lengths) <= size]
        size, name = int(lengths.sum()), f"{'train' if number else 'val'}-{number:05}"
        if sparse:
            shard = Shard(folder / name, size, len(lengths), size, VOCAB)
            for kind, (shape, dtype) in shard.content.items():
                with shard.file(kind).open("wb") as file:
                    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    if kind == "offsets":
                        file.write(np.concatenate([[0], np.cumsum(lengths)]).astype(dtype).tobytes())
                    file.truncate(HEADER + int(np.prod(shape)) * dtype.itemsize)
            record = {"name": name, "tokens": size, "documents": len(lengths), "bytes": size, "sha256": dict.fromkeys(shard.content, "")}
        else:
            with ShardWriter(folder / name, VOCAB) as writer:
                ids = rng.integers(0, VOCAB, size, dtype=token_dtype(VOCAB))
                writer.add(ids, lengths, size, np.zeros((len(lengths), 2), np.int64))
                record = writer.finish()
        shards.append(("train" if number else "val", record))
        left -= size * bool(number)
        if number and left < shard_tokens // 2:
            break
    tokenizer = BytesTokenizer()
    tokenizer.vocab = VOCAB
    write_index(folder, tokenizer, shards, [{"name": "made up"}])
    return folder


def opened(folder: pathlib.Path, seq: int, rows: str = "windows"):
    from llama_eqx import load_config
    from llama_eqx.data.dataset import open_data
    from llama_eqx.data.tokenizer import BytesTokenizer

    config = load_config("data=prepared", f"data.path={folder}", f"data.rows={rows}", "data.verify=false", "tokenizer=bytes").data
    return open_data(config, BytesTokenizer(), seq_len=seq, seed=0)


def speed(options: argparse.Namespace) -> None:
    from llama_eqx.data.pipeline import Parts, read

    folder = dataset(options.tokens)
    ids = np.load(folder / "train-00001.ids.npy", mmap_mode="r").view(np.ndarray)
    ids.max()  # maps the pages, to measure the processor and not the disk
    with contextlib.ExitStack() as stack:
        ways = {name: stack.enter_context(contextlib.closing(peer(ids, options.batch, options.seq))) for name, peer in PEERS.items()}
        for rows in ("windows", "documents", "packed", "single"):
            data = opened(folder, options.seq, rows)
            for row in range(0, len(data.train), options.batch):
                data.train.read(np.arange(row, min(row + options.batch, len(data.train))))  # maps the pages
            ways[rows] = stack.enter_context(read(Parts(data.train, data.order, options.batch, fingerprint=data.fingerprint)))
        found = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, batches in ways.items():
                for _ in range(options.batches):  # uses up the batches that were made ahead
                    next(batches)
                begin = time.perf_counter()
                for _ in range(options.batches):
                    next(batches)
                if turn:  # the first turn is a warm-up
                    found[name].append(options.batches * options.batch * options.seq / (time.perf_counter() - begin))
    floor = statistics.median(found["bare memmap"])
    for name, rates in found.items():
        rate = statistics.median(rates)
        numbers = {"tokens_per_second": round(rate), "of_bare_memmap": round(rate / floor, 3), "rounds": [round(r) for r in rates]}
        print(json.dumps({"name": name, "batch": options.batch, "seq": options.seq, **numbers}))


def start(options: argparse.Namespace) -> None:
    folder = dataset(options.tokens, sparse=True)
    for rows in ("windows", "documents", "packed", "packed"):
        code = f"from benchmarks.data.pipeline import started; started({str(folder)!r}, {options.seq}, {options.batch}, {rows!r})"
        subprocess.run([sys.executable, "-c", code], check=True)


def started(folder: str, seq: int, batch: int, rows: str) -> None:
    import grain  # noqa: F401

    from llama_eqx.compose import load_config  # noqa: F401
    from llama_eqx.data.dataset import open_data  # noqa: F401
    from llama_eqx.data.pipeline import Parts, read

    before, begin = memory_now(), time.perf_counter()
    data = opened(pathlib.Path(folder), seq, rows)
    found = {"name": rows, "tokens": data.train.targets, "opened_s": time.perf_counter() - begin, "opened_mib": grown(before)}
    with read(Parts(data.train, data.order, batch, fingerprint=data.fingerprint)) as batches:
        next(batches)
        print(json.dumps(found | {"batch_s": time.perf_counter() - begin, "batch_mib": grown(before), "imports_mib": before}))


def memory(options: argparse.Namespace) -> None:
    from llama_eqx.data.pipeline import Parts, read

    folder = dataset(options.tokens)
    for rows in ("windows", "documents", "packed"):
        data = opened(folder, options.seq, rows)
        steps = len(data.train) // options.batch
        with read(Parts(data.train, data.order, options.batch, fingerprint=data.fingerprint)) as batches:
            found = []
            for step in range(steps + 1):
                next(batches)
                if step % max(1, steps // 8) == max(1, steps // 8) - 1:
                    found.append(memory_now())
        print(json.dumps({"name": rows, "steps": steps, **{kind: [now[kind] for now in found] for kind in found[0]}}))


def memory_now() -> dict[str, float]:
    """Returns the memory of this process in MiB."""
    lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return {name: round(int(lines[key].split()[0]) / 1024, 1) for name, key in (("allocated", "RssAnon"), ("resident", "VmRSS"))}


def grown(before: dict[str, float]) -> dict[str, float]:
    return {name: round(now - before[name], 1) for name, now in memory_now().items()}


def starvation(options: argparse.Namespace) -> None:
    run_dir = tempfile.mkdtemp()
    quiet = ["tracking.wandb.mode=disabled", "train.eval_every=1000000", "train.sample_tokens=0", "checkpoint.every=0"]
    command = [sys.executable, "-m", "llama_eqx.train", f"run_dir={run_dir}", f"train.steps={options.steps}", *quiet]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in pathlib.Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    shares = [record["data/starved_fraction"] for record in records if "data/starved_fraction" in record][1:]
    speed = statistics.median(record["perf/tokens_per_second"] for record in records if "perf/tokens_per_second" in record)
    found = {"starved_fraction": statistics.mean(shares), "largest": max(shares), "records": len(shares), "tokens_per_second": round(speed)}
    print(json.dumps({"name": "default run"} | found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "start", "memory", "starvation"])
    parser.add_argument("--tokens", type=lambda text: int(text.replace("_", "")))
    for name, default in {"batch": 64, "seq": 2048, "rounds": 7, "batches": 320, "steps": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    options.tokens = options.tokens or (10**10 if options.what == "start" else 5 * 10**7)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(json.dumps({"name": "conditions", **circumstances(idle(loaded=True))}))
    {"speed": speed, "start": start, "memory": memory, "starvation": starvation}[options.what](options)
