"""`python -m llama_eqx.evaluate`: says how well a model predicts text, or does at benchmarks."""

import json
import os
import pathlib
import sys
from typing import Any

from llama_eqx.errors import StorageError
from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.evaluation import report  # after the config has been checked, so that a typo is answered at once
    from llama_eqx.evaluation.perplexity import evaluate
    from llama_eqx.processes import is_first

    if config.output is not None and is_first():
        write(config.output, "")  # fails before computing what cannot be kept
    if config.tasks is None:
        found = evaluate(config)
        notes, said, saved = found.notes, report.said(config, found), report.saved(config, found)
    else:
        from llama_eqx.evaluation.tasks import run_tasks

        said, saved, notes = run_tasks(config)
    if not is_first():
        return  # process 0 says it
    if config.output is not None:
        write(config.output, json.dumps(saved, indent=1, default=str) + "\n")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(said)


def write(output: str, text: str) -> None:
    """Raises `StorageError`."""
    try:
        with pathlib.Path(os.path.expanduser(output)).open("w" if text else "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror}", where=output, next="another place: output=FILE") from None


if __name__ == "__main__":
    run_verb("evaluate", main)
