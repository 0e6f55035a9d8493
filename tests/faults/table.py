"""python tests/faults/table.py FAULTS_LOG: how many trials of each kind ended identical, as a table in Markdown."""

import collections
import json
import pathlib
import sys

from harness import STEPS


def kind(trial: dict) -> str:
    if trial["when_saving"]:
        return "killed from outside while a save is under way"
    if trial["kill_after"] is not None:
        return "killed from outside at a random moment"
    if "SIGTERM" in trial["faults"]:
        return f"told to stop at {trial['faults'].split(':')[0]}"
    labels = [fault.split(":")[0] for fault in trial["faults"].split(";")]
    return f"killed at {', then at '.join(labels)}"


def table(path: pathlib.Path) -> str:
    trials = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = collections.defaultdict(list)
    for trial in trials:
        kinds[kind(trial)].append(trial)
    rows = [
        f"| {name} | {len(found)} | {sum(trial['starts'] > 1 for trial in found)} | {sum(trial['identical'] for trial in found)} |"
        for name, found in sorted(kinds.items())
    ]
    killed, same = sum(trial["starts"] > 1 for trial in trials), sum(trial["identical"] for trial in trials)
    left = sum(bool(trial["leftovers"]) for trial in trials)
    bound = 3 / len(trials)
    return "\n".join(
        [
            "| fault | trials | in which it struck before the end | identical |",
            "|---|---|---|---|",
            *rows,
            f"| **all** | **{len(trials)}** | **{killed}** | **{same}** |",
            "",
            f"A run has {STEPS} steps. Unfinished folders left over: {left}. "
            + (f"No failure in {len(trials)} trials bounds their rate below {bound:.1%} at 95%." if same == len(trials) else ""),
        ]
    )


if __name__ == "__main__":
    print(table(pathlib.Path(sys.argv[1])))
