"""`python -m llama_eqx.doctor`: what is wrong with a model, a dataset or this machine."""

import sys
from typing import Any

from llama_eqx.compose import compose, conf_dir, resolve, run_verb


def main(config: Any, overrides: list[str]) -> None:
    if config.path is None:
        from llama_eqx.diagnosis.environment import examine_environment

        report = examine_environment()
    elif config.against is None:
        from llama_eqx.diagnosis.examination import examine

        report = examine(config.path, published(), weights=config.weights)
    else:
        from llama_eqx.diagnosis.comparison import compare

        report = compare(config.path, config.against, config.tolerance)
    print(report)
    if report.wrong:
        sys.exit(4)


def published() -> dict[str, Any]:
    """The config of every preset whose sizes are all known."""
    names = sorted(path.stem for path in (conf_dir() / "model").glob("llama*.yaml"))
    configs = {name: resolve(compose(f"model/{name}", []))["model"] for name in names}
    return {name: config for name, config in configs.items() if config.dims.vocab is not None}


if __name__ == "__main__":
    run_verb("doctor", main)
