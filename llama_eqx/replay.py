"""`python -m llama_eqx.replay`: repeats a step whose numbers were not finite."""

from typing import Any

from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.training.replay import replay

    print(replay(config))


if __name__ == "__main__":
    run_verb("replay", main, log=False)
