"""What a run says of held-out text while it trains, and whether `evaluate` says the same of its checkpoint."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_eqx import load_config, load_pretrained, trace
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.evaluation.perplexity import evaluate
from llama_eqx.generation.run import generate
from llama_eqx.model import kernel
from llama_eqx.sharding import Layout
from llama_eqx.tracking import pictures
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.starts import read_starts
from llama_eqx.training.cross_entropy import head_scores
from llama_eqx.training.evaluation import Scores, Sums, bucket, fetched
from llama_eqx.training.loop import train
from llama_eqx.training.setup import set_up
from llama_eqx.training.traces import make_draw

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TRACES = ("residual", "attention_weights", "attention_entropy", "logit_lens")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    sizes = {"layers": 1, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
    config = load_config(
        *(f"model.dims.{axis}={size}" for axis, size in sizes.items()),
        *("data=text", f"data.path={GOLDEN / 'text.md'}", "data.rows=packed", "data.long_documents=cut", "tokenizer=bytes"),
        *("tracking.wandb.mode=disabled", f"run_dir={run_dir}", "train.steps=3", "train.batch_size=8", "train.seq_len=32"),
        *("train.eval_every=1", "train.sample_tokens=0", f"train.traces=[{','.join(TRACES)}]"),
        *("checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=2", "checkpoint.best_by=val/presets/loss"),
        *("+data@eval_data.presets=test", f"eval_data.presets.path={GOLDEN / 'presets'}"),
    )
    seen, plot_traces = [], pictures.plot_traces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "plot_traces", lambda *each: seen.append(each) or plot_traces(*each))
        return run_dir, train(config), seen


def test_the_verb_says_of_a_checkpoint_what_its_run_said(run):
    run_dir, result, _ = run
    whole = evaluate(load_config(f"checkpoint={run_dir}", name="evaluate"))
    (found,) = whole.results.values()
    assert whole.step == (3, 3)
    last = [record for record in read_metrics(run_dir / "metrics.jsonl") if "val/loss" in record][-1]
    assert last["val/loss"] == result.evaluation.loss == pytest.approx(found.loss, rel=1e-6)
    assert last["val/accuracy"] == pytest.approx(found.accuracy, abs=1e-12)
    assert last["val/bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-6)
    by_position = {f"val/loss_at_{position}": pytest.approx(loss, rel=1e-6) for position, (loss, _) in found.by_position.items()}
    assert {name: value for name, value in last.items() if "loss_at" in name} == by_position
    assert list(found.by_position) == [0, 1, 2, 4, 8, 16]
    assert result.evaluation.tokens == found.tokens


def test_a_picture_of_what_the_model_has_not_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(kernel, "show", lambda x, name: None)  # as if attention computed its own weights
    setup = set_up(load_config("data=text", f"data.path={GOLDEN / 'text.md'}", "tokenizer=bytes", "train.traces=[attention_entropy]"))
    with pytest.raises(ConfigError, match="no activation called attention_entropy") as raised:
        make_draw(setup)
    assert raised.value.where == "train.traces"


def test_a_run_without_a_checkpoint(run, tmp_path):
    run_dir, _, _ = run
    for kept in ("config.yaml", "tokenizer"):
        (tmp_path / kept).symlink_to(run_dir / kept)
    with pytest.raises(CheckpointError, match="no checkpoint has been saved yet"):
        evaluate(load_config(f"checkpoint={tmp_path}", name="evaluate"))


def test_sets_by_name(run):
    run_dir, _, _ = run
    arguments = ["data=test", f"data.path={GOLDEN / 'presets'}"]
    (found,) = evaluate(load_config(f"checkpoint={run_dir}", *arguments, name="evaluate")).results.values()
    named = [record["val/presets/loss"] for record in read_metrics(run_dir / "metrics.jsonl") if "val/presets/loss" in record]
    assert len(named) == 3
    assert named[1] != named[2]
    assert named[-1] == pytest.approx(found.loss, rel=1e-6)
    assert found.clusters == "documents"  # there are 16
    (start,) = read_starts(run_dir / "provenance.jsonl")
    assert start["eval_data"].keys() == {"presets"}


def test_the_best_checkpoint_stays_and_is_a_model_as_any(run, capsys):
    run_dir, _, _ = run
    losses = {r["step"]: r["val/presets/loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "val/presets/loss" in r}
    best = sorted(losses, key=losses.__getitem__)[:2]
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {*map(str, best), "3"}
    earlier = min(best)
    folder = run_dir / "checkpoints" / str(earlier)
    arguments = ["data=test", f"data.path={GOLDEN / 'presets'}"]
    (found,) = evaluate(load_config(f"checkpoint={folder}", *arguments, name="evaluate")).results.values()
    assert losses[earlier] == pytest.approx(found.loss, rel=1e-6)
    generate(load_config(f"checkpoint={folder}", "prompt=The ", "max_new_tokens=4", "temperature=0", name="generate"))
    assert capsys.readouterr().out.startswith("The")


@pytest.mark.parametrize("wrong", ["val/preset/loss", "val/accuracy"])
def test_a_best_by_that_nothing_gives(wrong):
    with pytest.raises(ConfigError, match=wrong) as error:
        load_config("checkpoint.keep_best=1", f"checkpoint.best_by={wrong}")
    assert "val/loss" in error.value.next


def test_the_losses_of_a_mixture_by_component_are_those_of_each_text(tmp_path):
    """Against the same texts as sets of their own, with rows of other sources in one batch and a last batch that is not full."""
    sizes = {"layers": 1, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
    held_out = {"prose": 0.2, "code": 0.6}
    texts = [("data.components.prose", "prose"), ("data.components.code", "code"), ("eval_data.a", "prose"), ("eval_data.b", "code")]
    train(
        load_config(
            *(f"model.dims.{axis}={size}" for axis, size in sizes.items()),
            *("data=mixture", "data@data.components.code=text", "data.weights.prose=0.7", "data.weights.code=0.3", "tokenizer=bytes"),
            *("+data@eval_data.a=text", "+data@eval_data.b=text", "data.components.code.rows=packed", "eval_data.b.rows=packed"),
            *("data.components.code.long_documents=cut", "eval_data.b.long_documents=cut"),
            *(f"{where}.path={GOLDEN / 'text.md'}" for where, _ in texts),
            *(f"{where}.validation_fraction={held_out[name]}" for where, name in texts),
            *("tracking.wandb.mode=disabled", f"run_dir={tmp_path / 'run'}", "train.steps=1", "train.batch_size=8", "train.seq_len=32"),
            *("train.sample_tokens=0", "checkpoint.keep_best=1", "checkpoint.best_by=val/code/loss"),
        )
    )
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["val/prose/loss"] == pytest.approx(last["val/a/loss"], rel=1e-6)
    assert last["val/code/loss"] == pytest.approx(last["val/b/loss"], rel=1e-6)
    assert last["val/prose/loss"] != pytest.approx(last["val/code/loss"], rel=1e-3)


def test_pictures_of_the_model_at_work(run):
    """What is drawn is seen in the model of that step, here over eight devices."""
    run_dir, _, seen = run
    found, tokens, _ = seen[-1]
    assert (len(seen), len(tokens)) == (3, 32)
    wanted = jax.device_get(trace(load_pretrained(run_dir), np.asarray([tokens]), TRACES))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)
    pictures = {path.stem: path.read_bytes() for path in (run_dir / "pictures").iterdir()}
    assert pictures.keys() == set(TRACES)
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())


def test_sums_do_not_depend_on_the_batches():
    rng = np.random.default_rng(0)
    nats = rng.lognormal(sigma=4, size=(60, 50)).astype(np.float32)
    positions = rng.integers(0, 50, nats.shape)
    scores = Scores(nats, nats < 1, (positions % 7 > 0).astype(np.float32), positions)

    def summed(size):
        sums = Sums(8)
        for first in range(0, 60, size):
            part = Scores(*(each[first : first + size] for each in scores))
            sums.add(bucket(part.positions), part)
        return sums

    for a, b in itertools.pairwise([summed(1), summed(7), summed(60)]):
        assert a.loss() == pytest.approx(b.loss(), rel=1e-14)
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-13)
    counted = scores.weights > 0
    assert summed(7).loss() == pytest.approx(nats[counted].astype(np.float64).mean(), rel=1e-13)
    assert summed(7).accuracy() == pytest.approx((nats[counted] < 1).mean(), rel=1e-13)


def test_a_batch_is_on_its_way_before_the_scores_of_the_last_are_read():
    sent = []
    scores = (sent.append(batch) or jnp.asarray(batch) for batch in range(3))
    assert [(int(each), len(sent)) for each in fetched(scores)] == [(0, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("chunk", [None, 5])
def test_scores_with_a_vocabulary_over_devices(chunk):
    """Where tokens are equally probable, the first is the most probable one, on whichever device it is."""
    config = load_config("mesh=cpu-8", "mesh.tensor=4", "sharding=fsdp_tensor")
    layout = Layout(config.mesh.build(), config.sharding)
    keys = jax.random.split(jax.random.key(0), 3)
    x, table = jax.random.normal(keys[0], (4, 6, 16)), jax.random.normal(keys[1], (16, 32))
    table = table.at[:, 21].set(table[:, 9])
    targets = jax.random.randint(keys[2], (4, 6), 0, 32).at[0].set(9).at[1].set(21)
    x = x.at[:2].set(table[:, 9] * 10)
    losses, right = jax.jit(lambda *args: head_scores(*args, chunk=chunk, layout=layout))(x, table, targets)
    logits = np.einsum("bsd,dv->bsv", np.asarray(x, np.float64), np.asarray(table, np.float64))
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    assert right[0].all()
    assert not right[1].any()
    np.testing.assert_array_equal(right[2:], jnp.argmax(jnp.einsum("bsd,dv->bsv", x, table), -1)[2:] == targets[2:])
