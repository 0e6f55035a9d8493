"""`python -m llama_eqx.convert`: writes a model in another format."""

import sys
from typing import Any

from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    import jax  # after the config has been checked, so that a typo is answered at once

    from llama_eqx.interop.conversion import convert

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, so no accelerator is taken

    for note in convert(config):
        print(f"note: {note}", file=sys.stderr)
    print(config.to)


if __name__ == "__main__":
    run_verb("convert", main)
