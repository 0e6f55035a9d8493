"""What checkpoints cost: `python benchmarks/checkpoint.py [MB] [FOLDER]` prints a table and writes benchmarks/checkpoint.json.

Every figure is a median, all in one process, and each rate stands beside the plain one that it is to be held against: the stall of the
training loop beside a copy of the same bytes in memory, a save beside writing the same bytes to the same disk with fsync, in nine
interleaved rounds; a restore beside reading the same files, five times each. A save ends when its folder has its name; the one before is
removed after that.
"""

import json
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from llama_eqx import load_config
from llama_eqx.checkpoint import restore
from llama_eqx.checkpoint.save import Checkpoints

ROUNDS, REPEATS = 9, 5
LEAVES = 24
RESULT = pathlib.Path(__file__).with_suffix(".json")


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


def main(megabytes: int, folder: pathlib.Path) -> None:
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
        """The bytes as they are, a file a leaf, on the disk."""
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

        saved()  # makes threads and imports
        stalls.clear(), saves.clear()
        copies, disks = [], []
        for _ in range(ROUNDS):  # what a shared disk takes changes by the minute: each save is held against the bare bytes just before
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
    result = {
        "bytes": size,
        "cpu": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "copy_s": copy,
        "stall_s": stall,
        "stall_over_copy": over_copy,
        "disk_gb_s": rate(disk),
        "save_gb_s": rate(save),
        "save_over_disk": statistics.median(over_disk),
        "save_over_disk_by_round": over_disk,
        "restore_gb_s": {kind: {name: rate(spent) for name, spent in times.items()} for kind, times in found.items()},
        "jax": jax.__version__,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{size / 1e9:.2f} GB in {LEAVES} arrays, {result['cpu']}")
    print(f"stall of the loop   {stall:7.3f} s   copy of the bytes  {copy:7.3f} s   ratio {over_copy:.2f}")
    ratio = f"ratio {statistics.median(over_disk):.2f}, {over_disk[0]:.2f} to {over_disk[-1]:.2f}"
    print(f"save, committed     {rate(save):7.3f} GB/s  disk with fsync  {rate(disk):7.3f} GB/s  {ratio}")
    for kind, times in found.items():
        said = "  ".join(f"{name} {rate(spent):.3f}" for name, spent in times.items())
        print(f"restore {kind}, GB/s: {said}")


if __name__ == "__main__":
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        main(megabytes, pathlib.Path(folder))
