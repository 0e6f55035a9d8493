"""Measures how fast text becomes token shards, compared with the tokenizer's library alone.

    python -m benchmarks.data.prepare sentencepiece=llama2/tokenizer.model tiktoken=llama3/tokenizer.model hf=FOLDER
        [--mb=200] [--rounds=3] [--files='GLOB'] [--form=jsonl]

The text is that of the files, by default the Python sources of the installed packages, one document each. `form` is the format in which
`prepare` finds it: jsonl, jsonl.gz, jsonl.zst or parquet.

In each round the library encodes half of the documents on all cores, in the fastest way that it offers, and drops the ids. It is already
loaded, with all documents in memory. Then `python -m llama_eqx.prepare` does all of its work on all documents: it starts, loads the
tokenizer, reads the text from disk, encodes it, and writes shards, index and hashes. Then the library encodes the other half.

Prints a line of JSON for each tokenizer: megabytes of text a second in each round, the median of their ratios, and the median ratio of
processor seconds, which other work on the machine does not change. `start_s` is the time of the same command on 50 documents, in seconds.
"""

import argparse
import functools
import glob
import gzip
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.record import circumstances, idle
from llama_eqx import load_config


def documents(pattern: str, size: int) -> list[str]:
    """Returns the texts of the files, of at most `size` bytes in total."""
    found, left = [], size
    for path in sorted(glob.glob(pattern, recursive=True)):
        try:
            text = pathlib.Path(path).read_text("utf-8")
        except (OSError, ValueError):
            continue
        left -= len(text.encode())
        if left < 0:
            break
        if text and "\0" not in text:
            found.append(text)
    return found


def write(texts: list[str], path: pathlib.Path) -> None:
    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)
        return
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content, 6) if path.suffix == ".gz" else content)


def ways(tokenizer: Any, cores: int) -> dict[str, Callable[[list[str]], Any]]:
    """Returns the ways in which the library can encode many texts on all cores, by name."""
    if hasattr(tokenizer, "pieces"):
        encode = functools.partial(tokenizer.pieces.encode, num_threads=cores)
        return {"encode": encode, "encode to numpy": functools.partial(encode, return_type="numpy")}
    if hasattr(tokenizer, "encoding"):
        to_numpy = functools.partial(tokenizer.encoding.encode_to_numpy, disallowed_special=())
        return {
            "encode_ordinary_batch": functools.partial(tokenizer.encoding.encode_ordinary_batch, num_threads=cores),
            "encode_to_numpy in threads": lambda texts: list(ThreadPoolExecutor(cores).map(to_numpy, texts)),
        }
    encode = functools.partial(tokenizer.library.encode_batch_fast, add_special_tokens=False)
    return {"encode_batch_fast": lambda texts: [encode(texts[i : i + 1000]) for i in range(0, len(texts), 1000)]}  # all at once take 10 GB


def timed(run: Callable[[], Any]) -> np.ndarray:
    """Returns the wall seconds, and the processor seconds of this process and of those that it started and waited for."""

    def now() -> np.ndarray:
        return np.array(
            [time.perf_counter(), sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))]
        )

    began = now()
    run()
    return now() - began


def compare(kind: str, path: str, texts: list[str], few: pathlib.Path, source: pathlib.Path, rounds: int) -> dict[str, Any]:
    """Compares the library with `prepare` on `source`, which has the texts. `few` has some of them."""
    chosen, cores, output = [f"tokenizer={kind}", f"tokenizer.path={path}"], len(os.sched_getaffinity(0)), source.with_name("output")

    def prepare(source: pathlib.Path) -> None:
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "llama_eqx.prepare", f"input={source}", f"output={output}", *chosen]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    found = ways(load_config("input=a", "output=b", *chosen, name="prepare").tokenizer.build(NotImplemented), cores)
    way = min(found, key=lambda name: timed(lambda: found[name](texts[: len(texts) // 20]))[0])
    start, library, whole, half = timed(lambda: prepare(few))[0], [], [], len(texts) // 2
    for _ in range(rounds):  # the speed of a machine varies
        before = timed(lambda: found[way](texts[:half]))
        whole.append(timed(lambda: prepare(source)))
        library.append(before + timed(lambda: found[way](texts[half:])))
    ratios = np.median(np.array(library) / np.array(whole), axis=0)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rates = {name: [round(megabytes / seconds, 3) for seconds, _ in each] for name, each in (("library", library), ("prepare", whole))}
    what = {"tokenizer": kind, "way": way, "documents": len(texts), "megabytes": round(megabytes, 2), "cores": cores}
    return what | rates | {"ratio": round(ratios[0], 3), "ratio_of_processor": round(ratios[1], 3), "start_s": round(start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--mb", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", default=f"{sysconfig.get_paths()['purelib']}/**/*.py")
    parser.add_argument("--form", default="jsonl", choices=["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
    options = parser.parse_args()
    texts = documents(options.files, int(options.mb * 1e6))
    print(json.dumps({"name": "conditions", **circumstances(idle(loaded=True))}))
    with tempfile.TemporaryDirectory() as folder:
        few, source = (pathlib.Path(folder, f"{name}.{options.form}") for name in ("few", "text"))
        write(texts[:50], few)
        write(texts, source)
        os.sync()  # so that the text is not written to the disk during the measurement
        for chosen in options.tokenizers:
            kind, _, path = chosen.partition("=")
            print(json.dumps({"form": options.form} | compare(kind, path, texts, few, source, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
