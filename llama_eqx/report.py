"""`python -m llama_eqx.report`: what the runs of an experiment prove, or how any runs differ, on a page."""

from typing import Any

from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.studies.report import report

    written = report(config)
    print(written.words)
    for path in written.files:
        print(f"written  {path}")


if __name__ == "__main__":
    run_verb("report", main, log=False)
