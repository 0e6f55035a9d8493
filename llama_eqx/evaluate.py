"""`python -m llama_eqx.evaluate`: says how well a model predicts text."""

import json
import pathlib
import sys
from typing import Any

from llama_eqx.compose import run_verb
from llama_eqx.errors import StorageError


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.evaluation.perplexity import evaluate  # after the config has been checked, so that a typo is answered at once
    from llama_eqx.evaluation.report import said, saved

    if config.output is not None:
        _try(config.output, "")
    found = evaluate(config)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(said(config, found))
    if config.output is not None:
        _try(config.output, json.dumps(saved(config, found), indent=1) + "\n")


def _try(output: str, text: str) -> None:
    """Writes the results, or before anything is computed sees that they can be written."""
    try:
        with pathlib.Path(output).open("a" if not text else "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror}", where=output, next="another place: output=FILE") from None


if __name__ == "__main__":
    run_verb("evaluate", main)
