"""`python -m llama_eqx.provenance`: which documents a row of a batch came from, and their text."""

from typing import Any

from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.data.provenance import provenance

    print(provenance(config))


if __name__ == "__main__":
    run_verb("provenance", main, log=False)
