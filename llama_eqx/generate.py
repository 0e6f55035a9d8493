"""`python -m llama_eqx.generate`: continues a prompt with a trained model."""

from typing import Any

from llama_eqx.compose import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.generation.text import generate

    print(generate(config))


if __name__ == "__main__":
    run_verb("generate", main)
