"""`python -m llama_eqx.dashboard`: a saved view and a report on W&B for the runs of a question."""

from typing import Any

from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.studies.dashboard import dashboard

    print("\n".join(dashboard(config)))


if __name__ == "__main__":
    run_verb("dashboard", main, log=False)
