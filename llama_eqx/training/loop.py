"""The training loop, to be read from top to bottom."""

import math
import pathlib
from typing import NamedTuple

import equinox as eqx
import jax

from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.config import dump
from llama_eqx.data.pipeline import TokenWindows, training_batches, validation_batches
from llama_eqx.data.shards import tokenize
from llama_eqx.errors import NonFiniteError
from llama_eqx.flops import flops_per_token, mfu
from llama_eqx.generation.text import continued
from llama_eqx.model.init import named
from llama_eqx.model.llama import Llama
from llama_eqx.sharding import Layout
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.plot import plot_loss
from llama_eqx.tracking.tracker import Tracker
from llama_eqx.training.evaluation import Evaluation, make_evaluate
from llama_eqx.training.loss import under
from llama_eqx.training.meter import Meter
from llama_eqx.training.run import RunConfig, settle, with_vocab
from llama_eqx.training.state import TrainState, abstract, init_state
from llama_eqx.training.step import Metrics, make_step

MAX_WITHHELD = 3  # updates in a row that may be withheld before a run is given up


class Result(NamedTuple):
    """What a finished run has to show: `checkpoint` is the folder of its last step, `sample` a continuation of the data's prompt."""

    evaluation: Evaluation
    sample: str
    run_dir: pathlib.Path
    checkpoint: pathlib.Path


def train(config: RunConfig) -> Result:
    """Trains from the last checkpoint in `run_dir`, or from the start, to `train.steps`.

    Raises `ConfigError`, `DataError`, `CheckpointError` and `StorageError` before the first step, `NonFiniteError` and
    `StorageError` after it.
    """
    # Where arrays are to live: first, since it asks least and may refuse.
    steps, size, length = config.train.steps, config.train.batch_size, config.train.seq_len
    layout = Layout(config.mesh.build(), config.sharding)
    batch_sharding = layout.sharding(("batch", "seq"), (size, length))

    # Text to tokens, and the sizes that follow from it.
    tokenizer = config.tokenizer.build(config.data)
    data = tokenize(config.data, tokenizer)
    config, warning = with_vocab(config, tokenizer)
    windows, held_out = TokenWindows(data.train, length), TokenWindows(data.val, length)

    # The shapes of the state, and the files of the run.
    optimizer, key = config.optimizer.build(), jax.random.key(config.seed)

    def initial(key: jax.Array) -> TrainState:
        return init_state(config.model, optimizer, config.precision, key)

    shapes = eqx.filter_eval_shape(initial, key)
    shardings = layout.shardings(shapes)
    run_dir = pathlib.Path(config.run_dir)
    settle(config, data.fingerprint)
    tokenizer.save(run_dir / "tokenizer")

    # What runs on the devices.
    view = under(config.precision, config.remat, layout)
    step_fn = eqx.filter_jit(make_step(optimizer, lambda step: config.schedule.rate(step, steps), view, layout), donate="all-except-first")
    evaluate_on = make_evaluate(view)
    dropout_key = jax.device_put(named(key, "dropout"), layout.sharding((), ()))
    flops = flops_per_token(shapes.model, length)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.model))
    device_kind = layout.mesh.devices.flat[0].device_kind

    def evaluate(model: Llama) -> Evaluation:
        batches = validation_batches(held_out, batch_sharding, batch_size=size)
        return evaluate_on(model, batches, data.val.bytes / data.val.tokens)

    with Checkpoints(run_dir / "checkpoints", config.checkpoint) as checkpoints:
        begin = checkpoints.latest or 0
        if begin:
            target = abstract(shapes, shardings)
            model, (step, opt_state) = checkpoints.restore(begin, target.model, (target.step, target.opt_state))
            state = TrainState(step, model, opt_state)
        else:
            state = jax.jit(initial, out_shardings=shardings)(named(key, "init"))

        with (
            Tracker(config.tracking, run_dir, settings=dump(config), steps=steps, start=begin) as tracker,
            training_batches(windows, batch_sharding, batch_size=size, seed=config.seed, start=begin) as batches,
        ):
            tracker.say(f"{parameters:,} parameters, {flops.causal:,.0f} FLOPs per token, {layout.mesh.size} x {device_kind}")
            tracker.say(f"{data.train.tokens:,} tokens to train on, {data.val.tokens:,} held out, vocabulary of {tokenizer.vocab:,}")
            if warning:
                tracker.say(f"warning: {warning}")
            if begin:
                tracker.say(f"resumed from step {begin} of {steps}")
            meter, late, losses, withheld = Meter(size * length), None, [], 0

            def report(step: int, metrics: Metrics) -> None:
                """Fetches the metrics of a step while the next one runs; logs them when it is time, with the mean loss since then."""
                nonlocal withheld
                fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
                losses.append(fetched["train/loss"])
                withheld = withheld + 1 if fetched["optim/withheld"] else 0
                if withheld == MAX_WITHHELD:
                    raise NonFiniteError(
                        f"loss or gradient was not finite for {withheld} steps in a row; their updates were withheld",
                        where=f"step {step}",
                        kept=f"checkpoint of step {checkpoints.latest}" if checkpoints.latest else "no checkpoint yet",
                        next="a lower learning rate (schedule.peak) or longer warm-up (schedule.warmup_steps)",
                    )
                if step % config.train.log_every == 0 or step in (begin + 1, steps):
                    speed = meter.read()
                    used = mfu(speed["perf/tokens_per_second"], flops.causal, device_kind, layout.mesh.size)
                    fetched |= speed | {"train/loss": sum(losses) / len(losses), "tokens": step * size * length}
                    tracker.log(step, fetched if used is None else fetched | {"perf/mfu": used})
                    losses.clear()

            evaluation = None
            for step in range(begin + 1, steps + 1):
                with meter.waiting():
                    batch = next(batches)
                state, metrics = step_fn((batch, dropout_key), state)
                if late:
                    report(*late)
                late = (step, metrics)
                evaluation_due, save_due = (
                    step % n == 0 or step == steps for n in (config.train.eval_every, config.checkpoint.every or steps)
                )
                if not (evaluation_due or save_due):
                    continue
                report(*late)
                late = None
                with meter.pause():
                    if evaluation_due:
                        evaluation = evaluate(state.model)
                        tracker.log(step, {"val/loss": evaluation.loss, "val/bits_per_byte": evaluation.bits_per_byte})
                    if save_due:
                        checkpoints.save(step, state.model, (state.step, state.opt_state))

            if evaluation is None:  # a finished run, asked again
                evaluation = evaluate(state.model)
            sample = continued(
                state.model, tokenizer, config.data.prompt, config.train.sample_tokens, temperature=0.8, top_p=0.95, seed=config.seed
            )
            tracker.sample(steps, sample)

    plot_loss(read_metrics(run_dir / "metrics.jsonl"), run_dir / "loss.png")
    return Result(evaluation, sample, run_dir, run_dir / "checkpoints" / str(max(begin, steps)))
