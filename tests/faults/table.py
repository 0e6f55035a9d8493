"""python tests/faults/table.py FAULTS_LOG: which faults struck, and how many of their runs ended identical, in Markdown."""

import collections
import json
import pathlib
import sys

from harness import EVERY, RUNS, STEPS, expected


def kind(fault: str) -> str:
    label = fault.partition(":")[0]
    if label in ("after", "saving"):
        return "killed from outside " + ("at a random moment" if label == "after" else "while a save is under way")
    return f"{'told to stop' if fault.endswith('SIGTERM') else 'killed'} at {label}"


def table(path: pathlib.Path) -> str:
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    struck, same = collections.Counter(), collections.Counter()
    for run in runs:
        kinds = [kind(fault) for fault in run["faults"][: len(run["ended"])]]
        struck.update(kinds)
        same.update(kinds if run["identical"] else [])
    otherwise = sum(run["ended"] != expected(run["faults"])[: len(run["ended"])] for run in runs)
    left = sum(bool(run["leftovers"]) for run in runs)
    rows = [f"| {name} | {count} | {same[name]} |" for name, count in sorted(struck.items())]
    bound = f" No failure after {struck.total()} faults bounds their rate below {3 / struck.total():.1%} at 95%." * (struck == same)
    return "\n".join(
        [
            "| fault | times | of these in runs that ended identical |",
            "|---|---|---|",
            *rows,
            f"| **all** | **{struck.total()}** | **{same.total()}** |",
            "",
            f"{len(runs)} of {RUNS} runs of {STEPS} steps with a save every {EVERY}, each through up to 7 faults in a row: "
            f"{sum(run['identical'] for run in runs)} ended identical, {left} left unfinished folders behind, and in {otherwise} a start "
            f"ended otherwise than by its fault.{bound}",
        ]
    )


if __name__ == "__main__":
    print(table(pathlib.Path(sys.argv[1])))
