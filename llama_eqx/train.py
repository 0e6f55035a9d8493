"""`python -m llama_eqx.train`: trains a model from YAML and the command line, and says what came of it."""

import shlex
from typing import Any

from llama_eqx.compose import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.training.loop import train  # after the config has been checked, so that a typo is answered at once

    result = train(config)
    run_dir, evaluation = shlex.quote(str(result.run_dir)), result.evaluation
    same = shlex.join(override for override in overrides if not override.startswith(("run_dir=", "train.steps=")))
    print(f"""
{result.sample}

validation  {evaluation.loss:.4f} nats per token, {evaluation.bits_per_byte:.4f} bits per byte, on {evaluation.tokens:,} tokens
curve       {result.run_dir / "loss.png"}
checkpoint  {result.checkpoint}
resume      python -m llama_eqx.train {same + " " * bool(same)}run_dir={run_dir} train.steps={2 * config.train.steps}
sample      python -m llama_eqx.generate checkpoint={run_dir} prompt={shlex.quote(config.data.prompt)}""")
    if config.tracking.wandb.mode != "disabled":
        print(f"view        wandb leet {run_dir}/wandb")


if __name__ == "__main__":
    run_verb("train", main)
