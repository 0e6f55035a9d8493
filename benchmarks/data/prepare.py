"""How fast text becomes token shards, beside the tokenizer's library alone.

    python -m benchmarks.data.prepare sentencepiece=llama2/tokenizer.model tiktoken=llama3/tokenizer.model hf=FOLDER
        [--mb=100] [--rounds=5] [--files='GLOB'] [--form=jsonl]

The text is that of the files, by default Python's own and its packages' sources, one document each; `form` is how `prepare` finds it:
jsonl, jsonl.gz, jsonl.zst or parquet. In each round the library encodes all documents, which it has in memory, on all cores and leaves the
ids there; then `prepare` reads the text from disk, encodes it, and writes shards, index and hashes, processes being started anew.
Prints a line of JSON for each tokenizer: megabytes of text a second, medians over the rounds, and the ratio; and the ratio of the
processor's seconds, of which other work on the machine takes nothing.
"""

import argparse
import glob
import gzip
import json
import os
import pathlib
import resource
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.record import circumstances
from llama_eqx import load_config
from llama_eqx.data.prepare import prepare


def documents(pattern: str, size: int) -> list[str]:
    """Of `size` bytes or less in all."""
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


def library(tokenizer: Any, texts: list[str], cores: int) -> Callable[[], Any]:
    """The fastest that the library itself offers for many texts."""
    if hasattr(tokenizer, "pieces"):
        return lambda: tokenizer.pieces.encode(texts, num_threads=cores)
    if hasattr(tokenizer, "encoding"):
        return lambda: tokenizer.encoding.encode_ordinary_batch(texts, num_threads=cores)
    return lambda: tokenizer.library.encode_batch_fast(texts, add_special_tokens=False)


def processor() -> float:
    """Seconds that this process and those it started and waited for have computed."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", default=f"{sysconfig.get_paths()['purelib']}/**/*.py")
    parser.add_argument("--form", default="jsonl", choices=["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
    options = parser.parse_args()
    texts = documents(options.files, int(options.mb * 1e6))
    megabytes, cores = sum(len(text.encode()) for text in texts) / 1e6, len(os.sched_getaffinity(0))
    print(json.dumps({"name": "conditions", **circumstances(os.getloadavg()[0])}))
    with tempfile.TemporaryDirectory() as folder:
        source, output = pathlib.Path(folder, f"text.{options.form}"), pathlib.Path(folder, "output")
        write(texts, source)
        for chosen in options.tokenizers:
            kind, _, path = chosen.partition("=")
            config = load_config(f"input={source}", f"output={output}", f"tokenizer={kind}", f"tokenizer.path={path}", name="prepare")
            encode = library(config.tokenizer.build(config), texts, cores)
            seconds, worked = {"library": [], "prepare": []}, {"library": [], "prepare": []}
            for _ in range(options.rounds):
                shutil.rmtree(output, ignore_errors=True)
                for name, run in {"library": encode, "prepare": lambda config=config: prepare(config)}.items():
                    began, before = time.perf_counter(), processor()
                    run()
                    seconds[name].append(time.perf_counter() - began)
                    worked[name].append(processor() - before)
            rates = {name: round(megabytes / statistics.median(found), 3) for name, found in seconds.items()}
            what = {"tokenizer": kind, "form": options.form, "documents": len(texts), "megabytes": round(megabytes, 2), "cores": cores}
            of_processor = statistics.median(worked["library"]) / statistics.median(worked["prepare"])
            ratios = {"ratio": round(rates["prepare"] / rates["library"], 3), "ratio_of_processor": round(of_processor, 3)}
            print(json.dumps({**what, "rounds": options.rounds, **rates, **ratios}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
