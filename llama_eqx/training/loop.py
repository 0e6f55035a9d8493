"""The training loop, to be read from top to bottom."""

import contextlib
import math
import pathlib
from typing import NamedTuple

import jax

from llama_eqx.checkpoint.fingerprint import fingerprint
from llama_eqx.checkpoint.native import CHECKPOINTS
from llama_eqx.checkpoint.restore import steps as saved_steps
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.checkpoint.store import Place
from llama_eqx.config import dump
from llama_eqx.crash import crash_point
from llama_eqx.data.dataset import held_out
from llama_eqx.data.pipeline import Progress, training_batches, validation_batches
from llama_eqx.data.rows import Rows
from llama_eqx.flops import flops_per_token
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.text import continued, prompt_tokens
from llama_eqx.model.llama import Llama
from llama_eqx.processes import of_first, once, require_same, watched
from llama_eqx.studies.pairing import check_registered, record_start
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.provenance import code, jax_settings
from llama_eqx.tracking.tracker import Tracker
from llama_eqx.training.ends import check_export, check_start, export, handed_on, open_start, other_tokenizer, seen_before
from llama_eqx.training.evaluation import Evaluation, make_evaluate
from llama_eqx.training.guard import require_finite
from llama_eqx.training.identity import check_shared, claim, file_tokenizer, origin
from llama_eqx.training.optimizer import learning
from llama_eqx.training.preemption import Preemption
from llama_eqx.training.profile import Profile
from llama_eqx.training.program import jitted_step
from llama_eqx.training.replay import explained_by_a_bundle, write_bundle
from llama_eqx.training.reporter import Reporter, is_logged, last_logged
from llama_eqx.training.run import RunConfig, home, warnings
from llama_eqx.training.setup import fresh_state, set_up
from llama_eqx.training.state import TrainState, abstract
from llama_eqx.training.traces import make_draw
from llama_eqx.writer import sole_writer


class Result(NamedTuple):
    """The results of a finished run: `checkpoint` is the folder of its last step, `sample` a continuation of the data's prompt.
    `export` is the folder of the exported model, if one was asked for.

    `speed` has the typical values of `perf/tokens_per_second` and the like; it is empty when nothing was trained.
    """

    evaluation: Evaluation
    sample: str
    speed: dict[str, float]
    run_dir: pathlib.Path
    checkpoint: Place
    export: pathlib.Path | None


@sole_writer
def train(config: RunConfig, preemption: Preemption | None = None) -> Result:
    """Trains from the last checkpoint in `run_dir`, or from the start, to `train.steps`.

    Raises `ConfigError` (also when another process writes in `run_dir`), `DataError`, `CheckpointError` and `StorageError` before
    the first step, `NonFiniteError` and `StorageError` after it, and `Stopped` when `preemption` has received a signal.
    """
    preemption = preemption or Preemption(config.checkpoint.grace)
    check_start(config)
    check_registered(config)
    setup = set_up(config)
    config, layout, batch_sharding, tokenizer, data, parts, program, key = setup
    steps, size, length = config.train.steps, config.train.batch_size, config.train.seq_len
    others = {name: held_out(source, tokenizer, seq_len=length, key=f"eval_data.{name}") for name, source in config.eval_data.items()}
    texts = {name: fingerprint for name, (_, fingerprint) in others.items()}
    prompt = prompt_tokens(tokenizer, config.data.prompt) or data.train.first()
    sample_tokens = min(config.train.sample_tokens, config.model.context - len(prompt))

    # The files of the run.
    run_dir = pathlib.Path(config.run_dir)
    check_export(config)
    weights = open_start(config)
    require_same(data.fingerprint, "tokens", where="data")
    if jax.process_count() > 1:
        require_same(str((code(), jax.__version__, jax_settings())), "code, JAX version or JAX settings", where="llama_eqx")
    changed = once(lambda: claim(config, tokenizer.fingerprint, data.fingerprint)) or []
    if config.checkpoint.store is None:
        check_shared(run_dir)
    beside, remarks = once(lambda: handed_on(config, tokenizer, weights)) or ({}, [])
    remarks += seen_before(config, data.fingerprint) + other_tokenizer(config, tokenizer)
    once(lambda: file_tokenizer(config, tokenizer, beside))
    source = once(lambda: origin(run_dir, tokenizer.fingerprint, data.fingerprint)) or {}
    saved = home(config) / CHECKPOINTS

    step_fn = jitted_step(program, config)
    evaluate_on, draw = make_evaluate(program.score), make_draw(setup)
    flops = flops_per_token(program.shapes.model, length, learning(config.train.only, program.shapes.model))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.shapes.model))
    device_kind = layout.mesh.devices.flat[0].device_kind

    def evaluate(model: Llama, rows: Rows) -> Evaluation:
        return evaluate_on(model, validation_batches(rows, batch_sharding, batch_size=size), rows)

    def is_due(step: int) -> bool:
        return step % config.train.eval_every == 0 or step == steps

    told: list[str] = []  # the tracker that says it comes later
    with Checkpoints(saved, config.checkpoint, told.append, run_dir) as checkpoints:
        checkpoints.require_room(program.shapes)
        target = abstract(program.shapes, program.shardings)
        restored = checkpoints.restore(target.model, target.training)
        begin, past = (restored.step, Progress(**restored.facts["progress"])) if restored else (0, parts.after(0))
        state = TrainState(model=restored.model, **restored.training) if restored else fresh_state(setup, weights)
        if config.study is not None and not begin:
            record_start(config, state.model, config.data.position_offset)

        with (
            Tracker(config.tracking, run_dir, settings=dump(config), steps=steps, start=begin, texts=texts, parameters=count) as tracker,
            Profile(config.profile, run_dir, tracker.say, len(layout.mesh.local_devices)) as profile,
            training_batches(parts, batch_sharding, size, past) as batches,
        ):
            tracker.say(f"run_dir={run_dir}")
            tracker.say(f"{count:,} parameters, {flops.causal:,.0f} FLOPs per token, {layout.mesh.size} x {device_kind}")
            tracker.say(f"{data.train.targets:,} tokens to train on, {data.val.targets:,} held out, vocabulary of {tokenizer.vocab:,}")
            for warning in (warnings(config, tokenizer) if begin < steps else []) + program.remarks + changed + data.notes + remarks:
                tracker.say(f"warning: {warning}")
            if weights is not None:
                tracker.say(f"starts from the weights in {config.init_from}")
                for note in weights.notes:
                    tracker.say(f"note: {note}")
            for line in told:
                tracker.say(line)
            if restored:
                files = len(restored.facts["files"])
                tracker.say(
                    f"resumed from step {begin} of {steps}, {files} files verified" if begin < steps else f"already trained to step {begin}"
                )
                if jax.process_index() == 0 and (last := last_logged(run_dir)) < begin - begin % config.train.log_every:
                    tracker.say(
                        f"warning: metrics.jsonl ends at step {last}: what was recorded from there to step {begin} is lost, unless it is "
                        f"where this checkpoint was copied from, or train.log_every was larger than {config.train.log_every}"
                    )
            reporter = Reporter(
                tracker,
                log_every=config.train.log_every,
                last_step=steps,
                max_withheld=config.guard.max_withheld,
                tokens=size * length,
                epochs=lambda step: data.epochs(step * size),
                flops_per_token=flops.causal,
                device_kind=device_kind,
                devices=layout.mesh.size,
                waited=lambda: batches.waited,
            )
            checkpoints.say, batches.settle = tracker.say, reporter.settle
            evaluation, measured, progress = None, {}, past
            done, save_every = begin, config.checkpoint.every or steps

            def measure() -> None:
                nonlocal evaluation, measured
                profile.between("an evaluation")
                with reporter.pause(), preemption.idle():
                    crash_point("evaluate")
                    evaluation = evaluate(state.model, data.val)
                    apart = {f"val/{name}/loss": evaluate(state.model, rows).loss for name, (rows, _) in others.items()}
                    pictures = draw(state.model)
                measured = evaluation.metrics(data.names) | apart
                tracker.log(done, {"tokens": progress.tokens, "flops": reporter.flops(done)} | measured)  # perhaps its step's only record
                for name, picture in pictures.items():
                    tracker.picture(done, name, picture)

            def write_sample() -> str:
                if not sample_tokens > 0:
                    return ""
                drawn = Sampling(temperature=0.8, top_p=0.95)
                text = continued(state.model, tokenizer, prompt, sample_tokens, drawn, seed=config.seed)
                tracker.sample(done, text)
                return text

            def save() -> None:
                profile.between("a save")
                require_finite(state, done)
                tracker.sync()  # a resumed run writes the records after a checkpoint again, but not those before
                facts = {**source, "progress": progress._asdict()}
                checkpoints.save(done, state.model, state.training, measured, facts)

            def keep() -> str:
                """Saves the last finished step, if it is not on the disk yet."""
                reporter.flush()
                if done > begin:
                    save()
                checkpoints.wait(last=True)
                return f"step {done} is saved" if done else "before the first step"

            def bundle() -> pathlib.Path:
                checkpoints.wait()  # the save under way is the one to replay from
                return write_bundle(setup, state.model, reporter.reported, reporter.metrics)

            with explained_by_a_bundle(bundle, lambda: saved_steps(saved)), preemption.training(keep):
                logged = of_first(jax.process_index() > 0 or is_logged(run_dir, begin, "val/loss"))
                if begin and is_due(begin) and not logged:  # it was stopped while it evaluated
                    measure()
                for step in watched(range(begin + 1, steps + 1), config.distributed.stall):
                    batch, progress = next(batches)
                    if profile.begins_with(step):
                        with reporter.pause():
                            profile.begin()
                    with preemption.idle() if step == begin + 1 else contextlib.nullcontext():  # it compiles
                        crash_point("compile")
                        state, metrics = step_fn((batch, key), state)
                    done, measured = step, {}
                    reporter.add(step, metrics, progress)
                    crash_point("step")
                    checkpoints.poll()  # not after the last save: its failure ends the run
                    if profile.ends_with(step):
                        with reporter.pause():
                            profile.end(metrics)
                    if is_due(step):
                        measure()
                        if step < steps:
                            with reporter.pause(), preemption.idle():
                                write_sample()
                    if step % save_every == 0 or step == steps:
                        with reporter.pause():
                            if not reporter.withheld or step == steps:
                                save()
                    preemption.check(step)
            checkpoints.finish(max(begin, steps))
            tracker.final(max(begin, steps), fingerprint(state))
            last = saved / str(max(begin, steps))
            if isinstance(last, pathlib.Path):
                tracker.checkpoint(run_dir / CHECKPOINTS / last.name)

            if evaluation is None:  # the run was finished already
                evaluation = evaluate(state.model, data.val)
            sample = write_sample()

    from llama_eqx.tracking.plot import plot_loss  # imported here: matplotlib would add a third of a second to every start

    once(lambda: plot_loss(read_metrics(run_dir / "metrics.jsonl"), run_dir / "loss.png"))
    return Result(evaluation, sample, reporter.typical(), run_dir, last, export(config))
