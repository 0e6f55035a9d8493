"""The training loop, to be read from top to bottom."""

import math
import pathlib
from typing import NamedTuple

import equinox as eqx
import jax

from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.config import dump
from llama_eqx.data.dataset import open_data
from llama_eqx.data.pipeline import Parts, process_rows, training_batches, validation_batches
from llama_eqx.flops import flops_per_token
from llama_eqx.generation.text import continued, prompt_tokens
from llama_eqx.model.init import named
from llama_eqx.model.llama import Llama
from llama_eqx.processes import of_first, once, require_same
from llama_eqx.sharding import Layout
from llama_eqx.studies.matching import matched
from llama_eqx.studies.pairing import record_start
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.plot import plot_loss
from llama_eqx.tracking.tracker import Tracker
from llama_eqx.training.ends import check_export, export, open_start, start
from llama_eqx.training.evaluation import Evaluation, make_evaluate
from llama_eqx.training.profile import Profile
from llama_eqx.training.program import make_program
from llama_eqx.training.reporter import Reporter, recorded
from llama_eqx.training.run import RunConfig, check_shared, claim, warnings, with_vocab
from llama_eqx.training.state import TrainState, abstract
from llama_eqx.writer import sole_writer


class Result(NamedTuple):
    """What a finished run has to show: `checkpoint` is the folder of its last step, `sample` a continuation of the data's prompt.
    `export` is the folder with the model for others, if there was to be one.

    `speed` are the typical values of `perf/tokens_per_second` and the like; empty when nothing was trained.
    """

    evaluation: Evaluation
    sample: str
    speed: dict[str, float]
    run_dir: pathlib.Path
    checkpoint: pathlib.Path
    export: pathlib.Path | None


@sole_writer
def train(config: RunConfig) -> Result:
    """Trains from the last checkpoint in `run_dir`, or from the start, to `train.steps`.

    Raises `ConfigError` (also when another process writes in `run_dir`), `DataError`, `CheckpointError` and `StorageError` before
    the first step, `NonFiniteError` and `StorageError` after it.
    """
    # Where arrays are to live: first, since it asks least and may refuse.
    steps, size, length = config.train.steps, config.train.batch_size, config.train.seq_len
    layout = Layout(config.mesh.build(), config.sharding)
    known = {axis: n for axis, n in vars(config.model.dims).items() if n is not None}
    layout.check({"batch": size, "seq": length, **known})
    batch_sharding = layout.sharding(("batch", "seq"), (size, length))

    # Text to tokens, and the sizes that follow from it.
    tokenizer = config.tokenizer.build(config.data)
    data = open_data(config.data, tokenizer, seq_len=length, seed=config.seed, distinct_rows=config.train.distinct_rows)
    parts = Parts(data.train, data.order, size, *process_rows(batch_sharding, size, length), data.fingerprint)
    config = matched(with_vocab(config, tokenizer))
    prompt = prompt_tokens(tokenizer, config.data.prompt) or data.train.first()
    sample_tokens = min(config.train.sample_tokens, config.model.context - len(prompt))

    # What the devices are to compute, and the files of the run.
    initial, step, loss, shapes, shardings, remarks = make_program(config, layout)
    run_dir, key = pathlib.Path(config.run_dir), jax.random.key(config.seed)
    check_export(config)
    weights = open_start(config)
    require_same(data.fingerprint, "tokens")
    changed = once(lambda: claim(config, data.fingerprint)) or []
    check_shared(run_dir)
    once(lambda: tokenizer.save(run_dir / "tokenizer"))

    step_fn = eqx.filter_jit(step, donate="all-except-first", compiler_options=config.mesh.compiler_options)  # pyright: ignore
    evaluate_on = make_evaluate(loss)
    dropout_key = jax.jit(lambda key: named(key, "dropout"), out_shardings=layout.sharding((), ()))(key)
    flops = flops_per_token(shapes.model, length)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.model))
    device_kind = layout.mesh.devices.flat[0].device_kind

    def evaluate(model: Llama) -> Evaluation:
        batches = validation_batches(data.val, batch_sharding, batch_size=size)
        return evaluate_on(model, batches, data.val.bytes / data.val.targets)

    with Checkpoints(run_dir / "checkpoints", config.checkpoint) as checkpoints:
        begin = of_first(checkpoints.latest or 0)
        if begin:
            target = abstract(shapes, shardings)
            model, (step, opt_state) = checkpoints.restore(begin, target.model, (target.step, target.opt_state))
            state = TrainState(step, model, opt_state)
        elif weights is not None:
            state = start(weights, config, shardings)
        else:
            state = jax.jit(initial, out_shardings=shardings)(named(key, "init"))
        if config.study is not None and not begin:
            record_start(config, state.model, getattr(config.data, "position_offset", 0))

        with (
            Tracker(config.tracking, run_dir, settings=dump(config), steps=steps, start=begin) as tracker,
            Profile(config.profile, run_dir, tracker.say) as profile,
            training_batches(parts, batch_sharding, size, parts.after(begin, recorded(run_dir, begin))) as batches,
        ):
            tracker.say(f"run_dir={run_dir}")
            tracker.say(f"{parameters:,} parameters, {flops.causal:,.0f} FLOPs per token, {layout.mesh.size} x {device_kind}")
            tracker.say(f"{data.train.targets:,} tokens to train on, {data.val.targets:,} held out, vocabulary of {tokenizer.vocab:,}")
            for warning in warnings(config, tokenizer) + remarks + changed + data.notes:
                tracker.say(f"warning: {warning}")
            if weights is not None:
                tracker.say(f"starts from the weights in {config.init_from}")
                for note in weights.notes:
                    tracker.say(f"note: {note}")
            if begin:
                tracker.say(f"resumed from step {begin} of {steps}" if begin < steps else f"trained to step {begin} already")
            reporter = Reporter(
                tracker,
                log_every=config.train.log_every,
                last_step=steps,
                tokens=size * length,
                epochs=lambda step: data.epochs(step * size),
                flops_per_token=flops.causal,
                device_kind=device_kind,
                devices=layout.mesh.size,
            )
            evaluation, save_every = None, config.checkpoint.every or steps
            for step in range(begin + 1, steps + 1):
                with reporter.waiting():
                    batch, progress = next(batches)
                profile.begin(step)
                state, metrics = step_fn((batch, dropout_key), state)
                reporter.add(step, metrics, progress)
                if profile.ends_with(step):
                    with reporter.pause():
                        profile.end(metrics)
                if step % config.train.eval_every == 0 or step == steps:
                    with reporter.pause():
                        evaluation = evaluate(state.model)
                        tracker.log(step, {"val/loss": evaluation.loss, "val/bits_per_byte": evaluation.bits_per_byte})
                if (step % save_every == 0 and not reporter.withheld) or step == steps:
                    with reporter.pause():
                        checkpoints.save(step, state.model, (state.step, state.opt_state))

            if evaluation is None:  # a finished run, asked again
                evaluation = evaluate(state.model)
            sample = ""
            if sample_tokens > 0:
                sample = continued(state.model, tokenizer, prompt, sample_tokens, temperature=0.8, top_p=0.95, seed=config.seed)
                tracker.sample(steps, sample)

    once(lambda: plot_loss(read_metrics(run_dir / "metrics.jsonl"), run_dir / "loss.png"))
    return Result(evaluation, sample, reporter.typical(), run_dir, run_dir / "checkpoints" / str(max(begin, steps)), export(config))
