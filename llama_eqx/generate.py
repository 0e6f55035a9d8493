"""`python -m llama_eqx.generate`: continues prompts with a trained model."""

from typing import Any

from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.generation.run import generate

    generate(config)


if __name__ == "__main__":
    run_verb("generate", main)
