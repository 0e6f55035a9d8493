"""What checkpoints cost: `python -m benchmarks.checkpoint [--mb 500] [--folder FOLDER] [--out benchmarks/results/checkpoint.json]`.

Every figure is a median, and all are measured in one process. Each rate is compared with a plain operation. In nine interleaved rounds, the
stall of the training loop is compared with a copy of the same bytes in memory, and a save with writing the same bytes to the same disk with
fsync. A restore is compared with reading the same files, five times each. A save ends when its folder has its name; the previous checkpoint
is removed after that.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import idle, write
from llama_eqx import load_config
from llama_eqx.checkpoint import restore
from llama_eqx.checkpoint.save import Checkpoints

ROUNDS, REPEATS = 9, 5
LEAVES = 24


def median(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(REPEATS))


def seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def forget(folder: pathlib.Path) -> None:
    """Drops the files from the page cache."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(megabytes: int, folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Returns the figures and a table of them."""
    key = jax.random.key(0)
    rows = megabytes * 10**6 // 4 // LEAVES // 1024
    tree = {f"w{i}": jax.random.normal(jax.random.fold_in(key, i), (rows, 1024)) for i in range(LEAVES)}
    jax.block_until_ready(tree)
    size, step = sum(leaf.nbytes for leaf in tree.values()), iter(range(1, 1000))
    training = {"step": jnp.int32(0)}
    config = load_config("checkpoint.keep=1").checkpoint

    def copied() -> float:
        return seconds(lambda: [np.array(leaf, copy=True) for leaf in tree.values()])

    def written() -> float:
        """Seconds to write the bytes as they are to the disk, one file per leaf."""
        raw = folder / "raw"
        raw.mkdir()

        def write() -> None:
            for name, leaf in tree.items():
                with (raw / name).open("wb") as stream:
                    stream.write(memoryview(np.asarray(leaf)).cast("B"))
                    stream.flush()
                    os.fsync(stream.fileno())

        spent = seconds(write)
        shutil.rmtree(raw)
        return spent

    stalls, saves = [], []
    with Checkpoints(folder / "checkpoints", config, lambda text: None) as checkpoints:

        def saved() -> None:
            named, begun = folder / "checkpoints" / str(next(step)), time.perf_counter()
            checkpoints.save(int(named.name), tree, training)
            stalls.append(time.perf_counter() - begun)
            while not named.exists():
                time.sleep(0.001)
            saves.append(time.perf_counter() - begun)
            checkpoints.wait(last=True)

        saved()  # starts threads and imports
        stalls.clear(), saves.clear()
        copies, disks = [], []
        for _ in range(ROUNDS):  # a shared disk's speed changes by the minute: compare each save with the bare bytes just before
            copies.append(copied())
            disks.append(written())
            saved()
        newest = folder / "checkpoints" / str(checkpoints.latest)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)  # noqa: E731
        parts = {"model": abstract(tree), "training": abstract(training)}

        def read_files() -> None:
            for file in (path for path in newest.rglob("*") if path.is_file()):
                file.read_bytes()

        def timed(action: Callable[[], object], *, cold: bool) -> float:
            if cold:
                forget(newest)
            return seconds(lambda: jax.block_until_ready(action()))

        def whole() -> object:
            return checkpoints.restore(parts["model"], parts["training"])

        found = {"cold": {}, "warm": {}}
        for name, cold in (("cold", True), ("warm", False)):
            found[name] = {
                "files": median(lambda: timed(read_files, cold=cold)),  # noqa: B023
                "orbax": median(lambda: timed(lambda: restore.read(newest, parts), cold=cold)),  # noqa: B023
                "verified": median(lambda: timed(whole, cold=cold)),  # noqa: B023
            }

    stall, copy, save, disk = (statistics.median(each) for each in (stalls, copies, saves, disks))
    over_copy = statistics.median(a / b for a, b in zip(stalls, copies, strict=True))
    over_disk = sorted(a / b for a, b in zip(disks, saves, strict=True))
    rate = lambda spent: size / spent / 1e9  # noqa: E731
    found = {kind: {name: rate(spent) for name, spent in times.items()} for kind, times in found.items()}
    result = {
        "bytes": size,
        "copy_s": copy,
        "stall_s": stall,
        "stall_over_copy": over_copy,
        "disk_gb_s": rate(disk),
        "save_gb_s": rate(save),
        "save_over_disk": statistics.median(over_disk),
        "save_over_disk_by_round": over_disk,
        "restore_gb_s": found,
    }
    lines = [f"| {size / 1e9:.2f} GB in {LEAVES} arrays | | of the plain way |", "|---|---|---|"]
    lines.append(f"| the loop stands still for | {stall:.3f} s | {over_copy:.2f} of a copy in memory |")
    by_round = f"{statistics.median(over_disk):.2f} of the disk with fsync; by round {over_disk[0]:.2f} to {over_disk[-1]:.2f}"
    lines.append(f"| a save, until it is committed | {rate(save):.2f} GB/s | {by_round} |")
    for kind, rates in found.items():
        for name, what in (("verified", "a restore, verified"), ("orbax", "the arrays alone")):
            of_files = f"{rates[name] / rates['files']:.2f} of reading the files ({rates['files']:.2f} GB/s)"
            lines.append(f"| {what}, from the {'disk' if kind == 'cold' else 'cache'} | {rates[name]:.2f} GB/s | {of_files} |")
    return result, "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--folder", type=pathlib.Path, help="on the disk that is meant")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--loaded", action="store_true", help="run on a busy machine too: to try the script, not for numbers")
    arguments = parser.parse_args()
    load = idle(arguments.loaded)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result, table = measured(arguments.mb, pathlib.Path(folder))
    write(arguments.out, result, table, load)


if __name__ == "__main__":
    main()
