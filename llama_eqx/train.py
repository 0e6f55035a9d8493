"""`python -m llama_eqx.train`: trains a model from YAML and the command line, and reports the result."""

import os
import shlex
import signal
import sys
import threading
from typing import Any

from llama_eqx.errors import Stopped


def leave_when_told() -> None:
    """Makes a signal of a scheduler or a closed terminal end this process with 75 and a line: outside of training nothing is to be saved.

    A thread does it, since the main thread may be in C code, where Python runs no handler. `Preemption` takes over while it is entered.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signals = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
    for number in signals:
        signal.signal(number, lambda *_: None)

    def listen() -> None:
        while (number := os.read(reader, 1)[0]) not in signals:
            pass
        stopped = Stopped(f"{signal.Signals(number).name}: nothing was being trained", code=75)
        print(stopped, file=sys.stderr, flush=True)
        os._exit(stopped.code)

    threading.Thread(target=listen, name="signals", daemon=True).start()


def main(config: Any, overrides: list[str]) -> None:
    import jax

    from llama_eqx.errors import NonFiniteError
    from llama_eqx.processes import count
    from llama_eqx.studies.pairing import keep
    from llama_eqx.training.loop import train  # after the config has been checked, so that a typo is answered at once
    from llama_eqx.training.preemption import Preemption
    from llama_eqx.training.program import keep_compiled

    if config.compile_cache:
        keep_compiled()
    run_dir = shlex.quote(config.run_dir)
    same = [override for override in overrides if not override.startswith(("run_dir=", "train.steps="))]
    command = shlex.join(["python", "-m", "llama_eqx.train", *same, f"run_dir={config.run_dir}"])
    several = f"\n            on each of the {n} hosts, or by the launcher that started this" if (n := count()) > 1 else ""
    try:
        with Preemption(config.checkpoint.grace, next=f"{command} train.steps={config.train.steps}{several}") as preemption:
            result = train(config, preemption)
    except NonFiniteError:
        if config.study is not None and jax.process_index() == 0:
            print(f"record: {keep(config)}", file=sys.stderr)  # it counts as the worst
        raise
    if jax.process_index() > 0:
        return  # process 0 says it

    evaluation, speed, exported, kept = result.evaluation, "", "", ""
    if config.study is not None:
        kept = f"\nrecord      {keep(config)}"
    if result.speed:
        rate, waited = result.speed["perf/tokens_per_second"], result.speed["data/starved_fraction"]
        speed = f"\nspeed       {rate:,.0f} tokens/s, {waited:.2%} of the time waiting for data"
        if "perf/mfu" in result.speed:
            speed += f", MFU {result.speed['perf/mfu']:.1%}"
    if result.export:
        exported = f"\nexport      {result.export} ({config.checkpoint.export})"
    words = " ".join(result.sample.split()[:3])
    prompt = config.data.prompt or (words if words.isprintable() and "\ufffd" not in words else "") or "Once upon a time"
    print(f"""
{result.sample}

validation  {evaluation.loss:.4f} nats per token, {evaluation.bits_per_byte:.4f} bits per byte, on {evaluation.tokens:,} tokens{speed}
curve       {result.run_dir / "loss.png"}
checkpoint  {result.checkpoint}{exported}{kept}
resume      {command} train.steps={2 * int(result.checkpoint.name)}{several}
sample      python -m llama_eqx.generate checkpoint={config.checkpoint.store or run_dir} prompt={shlex.quote(prompt)}""")
    if config.tracking.wandb.mode != "disabled":
        print(f"view        wandb leet {run_dir}/wandb")


if __name__ == "__main__":
    if not {"-m", "--multirun"} & {*sys.argv}:  # a sweep has jobs to wait for
        leave_when_told()
    from llama_eqx.verb import run_verb  # Hydra, which takes a moment

    run_verb("train", main)
