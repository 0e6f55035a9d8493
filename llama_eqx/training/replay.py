"""A step whose numbers were not finite: what a run records of it when it ends, and its replay."""

import contextlib
import dataclasses
import json
import math
import pathlib
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from llama_eqx.batch import Batch
from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG, MEND, configured, read_config
from llama_eqx.checkpoint.restore import newest, steps
from llama_eqx.config import Config
from llama_eqx.data.pipeline import place
from llama_eqx.errors import CheckpointError, ConfigError, NonFiniteError
from llama_eqx.files import reading, write_json
from llama_eqx.model.llama import Llama
from llama_eqx.processes import once
from llama_eqx.sharding import parameter_names
from llama_eqx.training.ends import open_start
from llama_eqx.training.identity import BUNDLES
from llama_eqx.training.loss import Loss
from llama_eqx.training.program import jitted_step
from llama_eqx.training.run import RunConfig, home
from llama_eqx.training.setup import Setup, fresh_state, set_up
from llama_eqx.training.state import TrainState, abstract
from llama_eqx.training.step import make_gradient

LAST = 2**30  # after every layer
OTHER = "use the code, the libraries and the mesh of the run: see its provenance.jsonl and config.yaml"


class ReplayConfig(Config):
    """`bundle` is a file that a run left in its `replay/`."""

    bundle: str | None

    def check(self) -> None:
        if self.bundle is None:
            raise ConfigError("bundle is not given", where="bundle", next="bundle=RUN_DIR/replay/step-1234.json")


def write_bundle(setup: Setup, model: Llama, step: int, metrics: dict[str, float]) -> pathlib.Path:
    """Writes `replay/step-<step>.json` into the run directory: the row numbers of the batch, the key, the loss and gradient norm of the
    run's `metrics`, and where `model` and its gradient cease to be finite. Every process calls it.

    The next step has begun already, and `model` has its update if that was finite; `replay` starts from before the step.
    """
    run_dir = pathlib.Path(setup.config.run_dir)
    saved = steps(home(setup.config) / CHECKPOINTS)
    bundle = {
        "step": step,
        **_drawn(setup, step),
        "checkpoint": saved[-1] if saved else None,
        **examine(setup, model, step),
        "loss": _said(metrics["train/loss"]),
        "gradient_norm": _said(metrics["optim/grad_norm"]),
    }
    path = run_dir / BUNDLES / f"step-{step}.json"

    def write() -> None:
        path.parent.mkdir(exist_ok=True)
        write_json(path, bundle)

    once(write)
    return path


@contextlib.contextmanager
def explained_by_a_bundle(write: Callable[[], pathlib.Path], saved: Callable[[], list[int]]) -> Iterator[None]:
    """A context for a loop. When its numbers are not finite, a bundle is written, and the error says how to look at it. It also says that
    there is no checkpoint when no steps are `saved`.
    """
    try:
        yield
    except NonFiniteError as error:
        path = shlex.quote(str(write()))
        if not saved():
            error.kept = "the record; there is no checkpoint yet"
        error.next += f"\npython -m llama_eqx.replay bundle={path} shows where they cease to be finite"
        raise


def replay(config: ReplayConfig) -> str:
    """Trains from the checkpoint before the step of a bundle, repeats the step, and says what is not finite in it. Writes nothing into
    the run directory.

    Raises `CheckpointError` when the bundle or its run cannot be read, when the data differs, when the step now has other rows, key or
    numbers, or when all of it is finite.
    """
    assert config.bundle is not None
    path = pathlib.Path(config.bundle)
    with reading(path, CheckpointError, "the bundle cannot be read", next="remove it, and the command of the run writes another"):
        bundle = json.loads(path.read_bytes())
        step, checkpoint = int(bundle["step"]), bundle["checkpoint"]
    run_dir = path.absolute().parents[1]
    config_then, data_then = _config(run_dir)
    setup = set_up(config_then)
    if setup.data.fingerprint != data_then:
        raise CheckpointError(
            f"the data is not that of the run: its fingerprint is {setup.data.fingerprint[:12]}…, but was {str(data_then)[:12]}…",
            where=str(run_dir / CONFIG),
            next="bring back the data and the tokenizer that this config.yaml names, as they were",
        )
    state = _state(setup, run_dir, checkpoint)
    step_fn = jitted_step(setup.program, setup.config)
    begin = checkpoint or 0
    for number in range(begin + 1, step):
        state, metrics = step_fn((_batch(setup, number), setup.key), state)
        jax.block_until_ready(metrics)  # otherwise the batches of all steps would be on the device at once
    found = {**_drawn(setup, step), **examine(setup, state.model, step)}
    same = [found[name] == bundle[name] for name in ("rows", "key")]
    same += [math.isfinite(float(found[name])) == math.isfinite(float(bundle[name])) for name in ("loss", "gradient_norm")]
    if not all(same):
        differing = [name for name, alike in zip(("rows", "key", "loss", "gradient_norm"), same, strict=True) if not alike]
        raise CheckpointError(
            "the step differs from the recorded one:\n"
            + "\n".join(f"{name}: {found[name]} now, {bundle[name]} then" for name in differing),
            where=str(path),
            next=OTHER,
        )
    _, metrics = step_fn((_batch(setup, step), setup.key), state)
    numbers = found["loss"], found["gradient_norm"], metrics["optim/update_norm"]
    if all(math.isfinite(float(number)) for number in numbers) and not found["weights_not_finite"]:
        raise CheckpointError("the step is finite: loss, gradient and update", where=str(path), next=OTHER)
    whence = f"the checkpoint of step {begin}" if begin else "the start"
    return f"step {step}, {step - begin} after {whence}, is again not finite\n{explained(found)}"


def examine(setup: Setup, model: Llama, step: int) -> dict[str, Any]:
    """The loss in nats per token and gradient norm of a step from the model before it, and what is not finite, by name and layer.

    `through_layers` is the number of layers, from the first, through which the loss is finite; None if it is through all.
    """
    batch, key = _batch(setup, step), jax.random.fold_in(setup.key, step - 1)
    train = setup.config.train
    gradient_of = make_gradient(setup.program.loss, setup.layout, train.microbatch_size, train.only)

    @eqx.filter_jit
    def gradients(model: Llama, batch: Batch, key: PRNGKeyArray) -> Any:
        sums, gradient = gradient_of(model, batch, key)
        return sums.cross_entropy / sums.weight, optax.tree.norm(gradient) / sums.weight, _finite(gradient), _finite(model)

    loss, norm, gradient, weights = jax.device_get(gradients(model, batch, key))
    names = parameter_names(model)
    return {
        "loss": _said(loss),
        "gradient_norm": _said(norm),
        "weights_not_finite": _listed(names, weights),
        "gradient_not_finite": _listed(names, gradient),
        "through_layers": None if math.isfinite(loss) else _through(setup.program.loss, model, batch, key),
    }


def explained(found: dict[str, Any]) -> str:
    """What `examine` found, as text, with the likeliest cause first."""
    lines = [f"loss {found['loss']}, gradient norm {found['gradient_norm']}"]
    if found["weights_not_finite"]:
        lines.append(f"weights that are not finite: {', '.join(found['weights_not_finite'])}")
    elif (through := found["through_layers"]) is not None:
        lines.append(
            f"the loss ceases to be finite in layer {through}" if through >= 0 else "the loss is not finite before the first layer"
        )
    if found["gradient_not_finite"]:
        first, count = found["gradient_not_finite"][0], len(found["gradient_not_finite"])
        lines.append(f"gradients that are not finite: {count}, the first of which, backwards from the loss, is that of {first}")
    elif not math.isfinite(float(found["gradient_norm"])):
        lines.append("every gradient is finite, but the norm of all is not")
    elif not found["weights_not_finite"]:
        lines.append("loss and gradient are finite, but the update is not: see optim/lr in metrics.jsonl")
    return "\n".join(lines)


def _through(loss: Loss, model: Llama, batch: Batch, key: PRNGKeyArray) -> int:
    """The layer (from 0) that makes the loss not finite: the layers before it do not. -1 if it is not finite without any layer."""

    @eqx.filter_jit
    def finite(model: Llama, layers: Array) -> Array:
        # Blocks whose weights are all zero add nothing to the residual.
        emptied = jax.tree.map(lambda leaf: jnp.where(_below(layers, leaf), leaf, jnp.zeros_like(leaf)), model.blocks)
        return jnp.isfinite(loss(eqx.tree_at(lambda m: m.blocks, model, emptied), batch, key)[1].cross_entropy)

    if not finite(model, jnp.int32(0)):
        return -1
    low, high = 0, model.config.dims.layers  # finite through `low` layers, not through `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if finite(model, jnp.int32(middle)) else (low, middle)
    return low


def _below(layers: Array, leaf: Array) -> Array:
    return (jnp.arange(leaf.shape[0]) < layers).reshape(-1, *[1] * (leaf.ndim - 1))


def _finite(model: Any) -> list[Array]:
    """Whether every parameter is finite, by layer for those in blocks."""

    def axes(name: str, leaf: Array) -> tuple[int, ...]:
        return tuple(range(1 if name.startswith("blocks.") else 0, leaf.ndim))

    return [jnp.isfinite(leaf).all(axes(name, leaf)) for name, leaf in zip(parameter_names(model), jax.tree.leaves(model), strict=True)]


def _listed(names: list[str], finite: list[Any]) -> list[str]:
    """The names of what is not finite, from the loss backwards: head, last norm, layers from the last to the first, embedding."""
    found = []
    for i, (name, flags) in enumerate(zip(names, finite, strict=True)):
        if name.startswith("blocks."):
            found += [(layer, i, f"{name} of layer {layer}") for layer, good in enumerate(flags) if not good]
        elif not flags:
            found.append((-1 if name == "embed" else LAST, i, name))
    return [said for *_, said in sorted(found, reverse=True)]


def _said(value: Any) -> str:
    """A number with all digits, as text: JSON has no numbers that are not finite."""
    return repr(float(value))


def _config(run_dir: pathlib.Path) -> tuple[RunConfig, str | None]:
    """The config of the run, with `update_norm` as the only meter, and the fingerprint of its data."""
    tree = read_config(run_dir)
    fingerprint = tree.pop("data_fingerprint", None)
    config = configured(run_dir, {**tree, "run_dir": str(run_dir)})
    if not isinstance(config, RunConfig):
        raise CheckpointError("this config.yaml is not that of a run", where=str(run_dir / CONFIG), next=MEND)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, meters=("update_norm",))), fingerprint


def _state(setup: Setup, run_dir: pathlib.Path, checkpoint: int | None) -> TrainState:
    if checkpoint is None:
        return fresh_state(setup, open_start(setup.config))
    target = abstract(setup.program.shapes, setup.program.shardings)
    # Not by `Checkpoints`: it would clear away a save that is under way, if the run still goes on.
    parts = {"model": target.model, "training": target.training}
    restored = newest(home(setup.config) / CHECKPOINTS, parts, checkpoint, print)
    assert restored is not None
    return TrainState(model=restored.model, **restored.training)


def _drawn(setup: Setup, step: int) -> dict[str, Any]:
    """What was drawn for a step: the numbers of its rows, and its key."""
    key = jax.random.key_data(jax.random.fold_in(setup.key, step - 1))
    return {"rows": setup.parts.numbers(step - 1).tolist(), "key": key.tolist()}


def _batch(setup: Setup, step: int) -> Batch:
    return place(setup.parts[step - 1].batch, setup.batch_sharding, setup.config.train.batch_size)
