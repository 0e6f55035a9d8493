"""`python -m llama_eqx.doctor`: what is wrong with a model, a dataset or this machine."""

import sys
from typing import Any

import yaml

from llama_eqx.compose import compose, conf_dirs, resolve
from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    if config.path is None:
        from llama_eqx.diagnosis.environment import examine_environment

        report = examine_environment()
    elif config.against is None:
        from llama_eqx.diagnosis.examination import examine

        report = examine(config.path, published, weights=config.weights)
    else:
        from llama_eqx.diagnosis.comparison import compare

        report = compare(config.path, config.against, config.tolerance)
    print(report)
    if report.wrong:
        sys.exit(4)


def published(dims: Any) -> dict[str, Any]:
    """The config of every preset of this width and depth, by name."""
    found = {}
    for file in sorted(path for folder in conf_dirs() for path in (folder / "model").glob("*.yaml")):
        sizes = yaml.safe_load(file.read_text(encoding="utf-8")).get("dims", {})  # composing all of them would take seconds
        if (sizes.get("embed"), sizes.get("layers")) == (dims.embed, dims.layers):
            found[file.stem] = resolve(compose(f"model/{file.stem}", []))["model"]
    return found


if __name__ == "__main__":
    run_verb("doctor", main)
