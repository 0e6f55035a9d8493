"""A run whose numbers are not finite saves none of them, and what it leaves behind shows where they came from."""

import json
import pathlib

import equinox as eqx
import pytest
from test_loop import config

from llama_eqx.checkpoint.native import load_native, save_native
from llama_eqx.checkpoint.restore import steps
from llama_eqx.compose import load_config
from llama_eqx.errors import CheckpointError, NonFiniteError
from llama_eqx.training.identity import ended_by
from llama_eqx.training.loop import train
from llama_eqx.training.replay import _drawn, examine, replay
from llama_eqx.training.setup import fresh_state, set_up


def asked(bundle):
    return replay(load_config(f"bundle={bundle}", name="replay"))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return set_up(config(tmp_path_factory.mktemp("setup") / "run"))


@pytest.fixture(scope="module")
def model(setup):
    return fresh_state(setup, None).model


def scaled(model, layer, factor):
    where = lambda m: m.blocks.feed_forward.up_proj  # noqa: E731
    return eqx.tree_at(where, model, where(model).at[layer].multiply(factor))


def test_the_layer_is_found(setup, model):
    found = examine(setup, model, 1)
    assert (found["weights_not_finite"], found["gradient_not_finite"], found["through_layers"]) == ([], [], None)
    for layer in (0, 1):
        found = examine(setup, scaled(model, layer, 1e38), 1)
        assert found["loss"] == "nan"
        assert found["weights_not_finite"] == []
        assert found["through_layers"] == layer
        assert found["gradient_not_finite"][0] == "final_norm.weight"  # the embedding is the head


def test_weights_that_are_not_finite_are_named_and_never_saved(tmp_path, model):
    save_native(scaled(model, 1, float("nan")), tmp_path / "weights")
    run = config(tmp_path / "run", f"init_from={tmp_path / 'weights'}", "checkpoint.every=1")
    with pytest.raises(NonFiniteError, match="3 steps in a row") as error:
        train(run)
    assert steps(tmp_path / "run" / "checkpoints") == []
    bundle = tmp_path / "run" / "replay" / "step-3.json"
    assert f"python -m llama_eqx.replay bundle={bundle}" in error.value.next
    assert error.value.kept == "the record; there is no checkpoint yet"
    with pytest.raises(CheckpointError, match="no checkpoint has been saved yet") as unsaved:
        load_native(run.run_dir)
    assert f"python -m llama_eqx.replay bundle={bundle}" in unsaved.value.next
    assert json.loads(bundle.read_text())["weights_not_finite"] == ["blocks.feed_forward.up_proj of layer 1"]
    said = asked(bundle)
    assert "step 3, 3 after the start, is again not finite" in said
    assert "weights that are not finite: blocks.feed_forward.up_proj of layer 1" in said


def test_fewer_steps_than_it_takes_to_give_up(tmp_path, model):
    save_native(scaled(model, 0, float("inf")), tmp_path / "weights")
    with pytest.raises(NonFiniteError, match="they are not saved"):
        train(config(tmp_path / "run", f"init_from={tmp_path / 'weights'}", "train.steps=2"))
    assert steps(tmp_path / "run" / "checkpoints") == []


def test_replayed_from_a_checkpoint(tmp_path, monkeypatch):
    """The loss is spoilt for every batch that has a certain token in a certain place, as one of the last batches does."""
    from llama_eqx.training.loss import LossConfig

    run = config(tmp_path / "run", "train.steps=8", "guard.max_withheld=1")
    mark = set_up(run).parts[6].batch.tokens
    build = LossConfig.build

    def spoilt(self, view, layout):
        loss = build(self, view, layout)

        def wrapped(model, batch, key):
            value, sums = loss(model, batch, key)
            factor = 1 + 0 * (batch.tokens == mark).all() / (1 - (batch.tokens == mark).all())
            return value * factor, sums._replace(cross_entropy=sums.cross_entropy * factor)

        return wrapped

    monkeypatch.setattr(LossConfig, "build", spoilt)
    with pytest.raises(NonFiniteError) as error:
        train(run)
    assert error.value.kept.startswith("the checkpoints, all of whose")
    assert steps(tmp_path / "run" / "checkpoints") == [3, 6]
    bundle = tmp_path / "run" / "replay" / "step-7.json"
    assert ended_by(run) == bundle.parent
    for other in ("guard.max_withheld=2", "train.steps=6", "schedule.peak=1e-4"):
        assert ended_by(config(tmp_path / "run", "train.steps=8", "guard.max_withheld=1", other)) is None
    under_way = tmp_path / "run" / "checkpoints" / "9.unfinished"
    under_way.mkdir()
    assert "step 7, 1 after the checkpoint of step 6, is again not finite\nloss nan" in asked(bundle)
    assert under_way.is_dir()  # the run may go on meanwhile

    left = json.loads(bundle.read_text())
    changed = {**left, "rows": [left["rows"][0] + 1, *left["rows"][1:]]}
    bundle.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="rows: "):
        asked(bundle)
    good = {**left, "step": 5, "checkpoint": 3, **_drawn(set_up(run), 5), "loss": "5.0", "gradient_norm": "1.0"}
    bundle.write_text(json.dumps(good))
    assert ended_by(run) == bundle.parent
    bundle.rename(bundle := bundle.with_name("step-5.json"))
    assert ended_by(run) is None  # it has been saved since
    with pytest.raises(CheckpointError, match="the step is finite: loss, gradient and update"):
        asked(bundle)

    bundle.write_text(json.dumps(left))
    config_yaml = tmp_path / "run" / "config.yaml"
    config_yaml.write_text(config_yaml.read_text().replace("data_fingerprint: ", "data_fingerprint: 0"))
    with pytest.raises(CheckpointError, match="the data is not that of the run"):
        asked(bundle)


def test_no_bundle(tmp_path: pathlib.Path):
    with pytest.raises(CheckpointError, match="the bundle cannot be read"):
        asked(tmp_path / "none.json")
