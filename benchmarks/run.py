"""The whole suite: `python -m benchmarks.run [part…] [--tokenizer KIND=FILE …]` measures and writes it up in benchmarks/results/README.md.

Parts: machine startup training decoding filled growth batches start memory starvation checkpoint prepare. The last needs tokenizer
files, such as sentencepiece=llama2/tokenizer.model. A part is a module of its own with more options:
`python -m benchmarks.training --help`.
Every part refuses a busy machine. If a part fails, the others go on, and the failure is reported. Plans for slices take hours and have a
command of their own, `python -m benchmarks.plan.run`.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.record import told

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "results"
OUT = "{out}"  # the file to which a part writes its figures; a part without it prints them
PARTS = {
    "machine": ["benchmarks.machine", "--out", OUT],
    "startup": ["benchmarks.startup", "--out", OUT],
    "training": ["benchmarks.training", "--out", OUT],
    "decoding": ["benchmarks.decoding", "--out", OUT],
    "filled": ["benchmarks.filled", "--out", OUT],
    "growth": ["benchmarks.growth", "--out", OUT],
    "batches": ["benchmarks.data.pipeline", "speed"],
    "start": ["benchmarks.data.pipeline", "start"],
    "memory": ["benchmarks.data.pipeline", "memory"],
    "starvation": ["benchmarks.data.pipeline", "starvation"],
    "checkpoint": ["benchmarks.checkpoint", "--out", OUT],
    "prepare": ["benchmarks.data.prepare"],
}
TITLE = """# Results

Written by `python -m benchmarks.run`; each part says when and where it was measured. [What the data costs](../data/README.md) explains
the parts batches, start, starvation and prepare.
"""


def measure(part: str, more: list[str]) -> bool:
    """Runs a part and returns whether it succeeded."""
    out = RESULTS / f"{part}.json"
    command = [sys.executable, "-m", *(word.format(out=out) for word in PARTS[part]), *more]
    print(f"\n{part}: {' '.join(command[1:])}", flush=True)
    if OUT in PARTS[part]:
        return subprocess.run(command, cwd=ROOT.parent).returncode == 0
    done = subprocess.run(command, cwd=ROOT.parent, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    if done.returncode == 0:
        out.with_suffix(".md").write_text(in_words(done.stdout))
    return done.returncode == 0


def in_words(said: str) -> str:
    """Turns lines of JSON into a table with a column per key. Conditions and other lines stay as they are."""
    records, rest, conditions = [], [], []
    for line in said.splitlines():
        record = json.loads(line) if line.startswith("{") else {}
        if record.get("name") == "conditions":
            conditions += [told(record), ""]
        elif record:
            records.append(dict(cells(record)))
        else:
            rest.append(line)
    keys = list(dict.fromkeys(key for record in records for key in record))
    rows = [[record.get(key, "") for key in keys] for record in records]
    table = [f"| {' | '.join(row)} |" for row in ([keys, ["---"] * len(keys), *rows] if rows else [])]
    return "\n".join([*conditions, *table, *([""] if table and rest else []), *(["```", *rest, "```"] if rest else [])]) + "\n"


def cells(record: dict[str, Any], of: str = "") -> Iterator[tuple[str, str]]:
    """Yields the heads of columns and their cells. What a key holds by name has a column each; of a list, the least and the greatest."""
    for key, value in record.items():
        name = of + key.replace("_", " ")
        if isinstance(value, dict):
            yield from cells(value, f"{name}, ")
        else:
            yield name, " to ".join(map(shown, (min(value), max(value)) if isinstance(value, list) else [value]))


def shown(value: float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], choices=[*PARTS, []], metavar="part", help="without any: all")
    parser.add_argument("--tokenizer", nargs="*", default=[], metavar="KIND=FILE")
    arguments = parser.parse_args()
    parts = arguments.parts or [part for part in PARTS if part != "prepare" or arguments.tokenizer]
    RESULTS.mkdir(exist_ok=True)
    failed = [part for part in parts if not measure(part, arguments.tokenizer if part == "prepare" else [])]
    written = [f"## {part}\n\n{file.read_text()}" for part in PARTS if (file := RESULTS / f"{part}.md").exists()]
    (RESULTS / "README.md").write_text("\n".join([TITLE, *written]))
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
