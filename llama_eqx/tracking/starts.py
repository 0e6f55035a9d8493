"""`provenance.jsonl`, the record of a run's starts: one JSON object per line, with the `step` from which each began or went on."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from llama_eqx.config import Difference, differences, known_to_both
from llama_eqx.errors import DataError
from llama_eqx.files import MALFORMED, reading

NUMBERS = ("code", "commit", "extensions", "versions", "computed", "jax", "train")  # what the numbers of a start depend on


def read_starts(path: pathlib.Path, *, lenient: bool = False) -> list[dict[str, Any]]:
    """The starts; none without a file. Raises `DataError` naming a line that records none, unless it is `lenient` and leaves it out."""
    found = []
    with reading(path, DataError, "no record of the starts", next="move it away"):
        lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            found.append(start_in(json.loads(line)))
        except MALFORMED as error:
            if not lenient:
                raise DataError("this line is no record of a start", where=f"{path}:{number}", next="remove the line") from error
    return found


def start_in(found: Any) -> dict[str, Any]:
    """The start in JSON that was read. Raises one of `MALFORMED` unless its parts have the types that they are written with."""
    parts = [found.get(name, {}) for name in (*NUMBERS, "eval_data") if name != "commit"]
    known = type(found.get("step", 0)) is int and isinstance(found.get("parameters"), int | None)
    if not known or not all(isinstance(part, dict) for part in parts) or not all(isinstance(code, str) for code in parts[0].values()):
        raise ValueError("not as it was written")
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """What affects the numbers and is known of both starts. Commits count only if the code, which commits may share, is unknown."""
    names = [name for name in NUMBERS if name in before and name in after]
    names = [name for name in names if name not in ("commit", "extensions") or "code" not in before]
    old, new = {name: before[name] for name in names}, {name: after[name] for name in names}
    # An extension that came or went is not used by the run, which could not be built without it.
    for name in {"code", "computed"} & old.keys():
        old[name], new[name] = known_to_both(old[name], new[name]), known_to_both(new[name], old[name])
    return differences(old, new)


def changes(starts: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    """What changed between the starts that led to the state after `step`: "train.steps: 20 -> 24 after step 20".

    A start leads to it up to the step from which the next went on, so one of which nothing was left does not count.
    """
    led: list[Mapping[str, Any]] = []
    for start in reversed(starts):
        if start.get("step", 0) < (led[0]["step"] if led else step):
            led.insert(0, {"step": 0, **start})
    return [f"{each} after step {after['step']}" for before, after in itertools.pairwise(led) for each in changed(before, after)]
