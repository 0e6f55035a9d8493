"""What is worth compiling, what comes of it, and where it is written."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from llama_eqx import compose, load_config
from llama_eqx import plan as plan_verb
from llama_eqx.errors import ConfigError, StorageError, UserError
from llama_eqx.planning import search as module
from llama_eqx.planning.chips import CHIPS, Torus
from llama_eqx.planning.estimate import Estimate
from llama_eqx.planning.plan import make_plan
from llama_eqx.planning.search import MOST, candidates, check_writable, file_plan, search

DIMS = ("vocab=320", "layers=4", "embed=256", "heads=4", "kv_heads=2", "head_dim=64", "mlp=704")
BASE = ["mesh=cpu-8", "mesh.topology=v5e:2x4", "train.seq_len=512", "model.context=512", *(f"model.dims.{dim}" for dim in DIMS)]
REMATS = ["full", "none"]


def variant(*overrides):
    return load_config(*BASE, *overrides, name="plan", plan=False)


@pytest.fixture
def slice_of_eight(monkeypatch):
    """Eight virtual devices that pass for a slice of v5e, with as much memory as a test wants."""

    def memory(size, host=2**40, shape=(2, 4), ring=False, overlaps=True):
        chip = CHIPS["TPU v5 lite"]._replace(memory=size, host=host, overlaps=overlaps)
        torus = Torus(chip, np.array(list(itertools.product(*map(range, shape)))), (ring,) * len(shape))
        monkeypatch.setattr(module, "build_mesh", lambda config: config.build(jax.devices()))
        monkeypatch.setattr(module.Torus, "of", lambda devices: torus)

    return memory


def test_what_fits_is_ranked(slice_of_eight):
    slice_of_eight(2**30)
    ranked = candidates(variant, REMATS, [])
    assert ranked == sorted(ranked, key=lambda candidate: candidate.seconds)
    assert all(candidate.bytes < 2**30 for candidate in ranked)
    assert {override for candidate in ranked for override in candidate.overrides} >= {"remat=full", "mesh.tensor=2", "mesh.data=2"}
    best = ranked[0]
    rebuilt = variant(*best.overrides)
    assert dataclasses.replace(best.config, run_dir="") == dataclasses.replace(rebuilt, run_dir="")  # the overrides say all

    slice_of_eight(best.bytes)  # and no more: the best no longer fits
    fewer = candidates(variant, REMATS, [])
    assert best not in fewer
    assert {c.overrides for c in fewer} < {c.overrides for c in ranked}


def test_less_memory_means_more_remat(slice_of_eight):
    slice_of_eight(40 * 2**20)
    ranked = candidates(variant, REMATS, [])
    assert all("remat=full" in candidate.overrides for candidate in ranked if "train.batch_size=16" in candidate.overrides)


def test_what_the_user_says_stays(slice_of_eight):
    slice_of_eight(2**30)
    said = ["remat=full", "train.batch_size=32", "mesh.tensor=2", "sharding=fsdp_tensor"]
    ranked = candidates(lambda *more: variant(*said, *more), REMATS, [override.partition("=")[0] for override in said])
    assert {candidate.config.train.batch_size for candidate in ranked} == {32}
    assert {candidate.config.mesh.tensor for candidate in ranked} == {2}
    assert {candidate.config.remat.policy for candidate in ranked} == {"full"}
    assert {candidate.config.train.microbatch_size for candidate in ranked} == {4, 8, 16, 32}
    for sizes, batch in ((["train.microbatch_size=48"], 48), (["train.batch_size=32", "train.microbatch_size=8"], 32)):
        fixed = ["sharding", "remat", *(size.partition("=")[0] for size in sizes)]
        ranked = candidates(functools.partial(variant, *sizes), REMATS, fixed)
        found = {(candidate.config.train.batch_size, candidate.config.train.microbatch_size) for candidate in ranked}
        assert found == {(batch, int(sizes[-1].partition("=")[2]))}
        assert not [override for candidate in ranked for override in candidate.overrides if override in sizes]


def test_where_gathers_wait_they_are_added(slice_of_eight):
    def seconds(overlaps):
        slice_of_eight(2**40, overlaps=overlaps)
        ranked = candidates(variant, ["full"], ["mesh"])
        return {candidate.config.train.microbatch_size // 8: candidate.seconds for candidate in ranked}

    beside, waiting = seconds(True), seconds(False)
    lost = {rows: rows * (waiting[rows] - beside[rows]) for rows in beside}
    hidden = [rows for rows in sorted(lost) if lost[rows] == pytest.approx(max(lost.values()))]
    assert hidden == [24, 32]  # which compute for long enough to hide a whole gather, so that the loss is one gather, whatever the rows
    assert lost[1] > 0


def test_what_is_put_on_the_host_fits_there(slice_of_eight):
    def most_rows(host):
        slice_of_eight(2**30, host)
        ranked = [candidate for candidate in candidates(variant, ["offload"], []) if candidate.config.mesh.tensor == 1]
        return max(candidate.config.train.batch_size for candidate in ranked)

    kept = 4 * 512 * 256 * 4  # bytes of a row: four layers of 512 tokens of 256 float32
    assert most_rows(2**40) > 32
    assert most_rows(5 * kept) == 32  # of 8, 16, 24, 32 and 48: four rows on each of eight devices


def test_what_goes_to_the_host_goes_beside_the_forward_pass(slice_of_eight, monkeypatch):
    """Which is a third of the computation: a link that needs 0.4 of it each way is waited for on the way there, and not on the way back."""

    def seconds(link):
        monkeypatch.setattr(module, "HOST_LINK", link)
        slice_of_eight(2**30, 2**40)
        return candidates(variant, ["offload"], ["mesh", "sharding", "train.batch_size", "train.microbatch_size"])[0].seconds

    monkeypatch.setattr(module, "collective_seconds", lambda *_: 0.0)
    compute, kept = seconds(1e30), 4 * 256 * 4  # of a token: four layers of 256 float32
    np.testing.assert_allclose(seconds(kept / (0.4 * compute)) - compute, (0.4 - 1 / 3) * compute, rtol=1e-6)


def test_a_gather_over_a_whole_torus_waits(slice_of_eight):
    def seconds(ring):
        slice_of_eight(2**30, shape=(2, 2, 2), ring=ring)
        ranked = candidates(variant, ["full"], ["train.batch_size", "train.microbatch_size"])
        return {candidate.overrides[0]: candidate.seconds for candidate in ranked}

    line, ring = seconds(False), seconds(True)
    assert line["remat=full"] < line["mesh.data=2"]
    assert ring["mesh.data=2"] < ring["remat=full"]  # which is all of fsdp


def test_nothing_fits(slice_of_eight):
    slice_of_eight(2**20)
    with pytest.raises(UserError, match=r"nothing fits into the 0\.0 GiB of a device: the smallest setting takes"):
        candidates(variant, REMATS, [])


def test_sizes_that_no_shape_of_the_mesh_divides(slice_of_eight):
    slice_of_eight(2**30)
    with pytest.raises(ConfigError, match="5"):
        candidates(functools.partial(variant, "train.microbatch_size=5"), REMATS, ["sharding", "remat", "train.microbatch_size"])


def test_only_slices_are_searched():
    with pytest.raises(UserError, match="only TPU slices"):
        candidates(lambda *more: load_config("mesh=cpu-8", *more, name="plan"), REMATS, [])


def test_the_best_is_written_and_train_takes_it(slice_of_eight, monkeypatch, tmp_path):
    slice_of_eight(2**30)
    plain = make_plan(load_config("mesh=cpu-8", "tokenizer=bytes", "model.dims.vocab=320", name="plan"))
    compiled = []

    def fake_plan(config):
        compiled.append(config)
        if len(compiled) == 1:
            return dataclasses.replace(plain, config=config, compiled=None)  # the compiler finds it too big
        seconds = {3: 2.0, 4: 1.0}.get(len(compiled), 4.0)  # the fastest of all compiles, and is too big
        return timed(dataclasses.replace(plain, config=config), seconds, needs=2**31 if len(compiled) == 4 else 2**30)

    monkeypatch.setattr(module, "make_plan", fake_plan)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(module, "HOPELESS", 100.0)
    path = tmp_path / "plan" / "llama3_1m_cpu-8.yaml"
    check_writable(path)
    overrides = [*BASE, "run_dir=x", "search=2", "train.steps=5", "checkpoint.store=gs://a/b", "+mesh.compiler_options.xla_x=true"]
    again = lambda *more: load_config(*overrides, *more, name="plan", plan=False)  # noqa: E731
    found = search(again, overrides, REMATS)
    assert len(compiled) == MOST
    assert found.plan.config == compiled[2]
    compiled.clear()
    few = search(again, overrides, REMATS, enough=1)
    assert few.plan.config == compiled[2]  # the first that fits, with the other backward pass
    assert [config.kernel.fused_backward for config in compiled] == [True, True, False]
    assert dataclasses.replace(compiled[2], kernel=compiled[1].kernel) == compiled[1]
    assert [override for override in few.overrides if "fused_backward" in override] == ["kernel.fused_backward=false"]
    compiled.clear()
    search(again, [*overrides, "kernel.fused_backward=true"], REMATS, enough=1)
    assert len(compiled) == 2

    assert "written" in file_plan(path, found, "search=2", lambda: pytest.fail("there is none before"))
    text = path.read_text()
    assert text.count("does not fit") == 2
    assert "(estimate)" in text
    assert "# Found by search=2 with jax" in text
    monkeypatch.setattr(compose, "plan_file", lambda overrides: path)
    planned = load_config("mesh=cpu-8", "run_dir=x", "model.context=512")
    for part in ("precision", "remat", "kernel", "sharding", "mesh"):
        assert getattr(planned, part) == getattr(found.plan.config, part), part
    assert planned.train == dataclasses.replace(found.plan.config.train, steps=planned.train.steps)
    assert (planned.train.steps, planned.checkpoint.store) == (1200, None)  # what was the user's own stays theirs

    rows = found.plan.config.train.batch_size
    mine = load_config("mesh=cpu-8", "remat=dots", f"train.batch_size={4 * rows}", "model.context=512")  # the command line wins
    assert (mine.remat.policy, mine.train.batch_size, mine.precision) == ("dots", 4 * rows, planned.precision)
    assert mine.train.microbatch_size == rows  # and goes through the model in parts that are known to fit
    assert load_config("mesh=cpu-8", plan=False).precision != planned.precision


def timed(plan, seconds, needs=2**30):
    """As if compiled for a slice: with `seconds` for each row of the batch."""
    times = Estimate(seconds * plan.config.train.batch_size, 1.0, 1.0, 0.0, {}, ())
    return dataclasses.replace(plan, estimate=times, device_kind="TPU v4", needs=needs, may=2**30)


def test_a_plan_that_is_there_stays_unless_it_is_beaten(monkeypatch, tmp_path):
    plain = make_plan(load_config("mesh=cpu-8", "tokenizer=bytes", "model.dims.vocab=320", name="plan"))
    found = module.Found(timed(plain, 2.0), ("remat=full",), ())
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "0")
    path = tmp_path / "plan.yaml"

    def filed(before):
        path.write_text("overrides: [remat=none]")
        monkeypatch.setattr(module, "make_plan", lambda config: before)
        return file_plan(path, found, "search=true", lambda: plain.config), path.read_text()

    for before in (timed(plain, 1.0), timed(plain, 2.0)):
        said, text = filed(before)
        assert text == "overrides: [remat=none]"
        assert said.startswith("kept, as nothing better was found: 1.00 GiB")
    for before in (timed(plain, 3.0), timed(plain, 1.0, needs=2**31)):
        said, text = filed(before)
        assert "- remat=full" in text
        assert "# In place of a plan with " in text
        assert said.startswith("written, in place of a plan with ")

    def no_run():
        raise ConfigError("the compiler fails")

    assert "a plan that cannot be compiled any more (the compiler fails)" in file_plan(path, found, "search=true", no_run)
    assert "# In place of a plan that cannot be compiled any more (the compiler fails)." in path.read_text()


def test_a_place_that_cannot_be_written_is_found_first(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        check_writable(tmp_path / "file" / "plan.yaml")
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="no permission"):
        check_writable(tmp_path / "plan.yaml")


@pytest.mark.parametrize("other", ["model.dims.layers=2", "optimizer=lion"])
def test_the_plan_of_another_model_is_not_written(other, monkeypatch, tmp_path, capsys):
    """It is searched and told all the same."""
    said = ["mesh=cpu-8", "tokenizer=bytes", "train.seq_len=128", f"run_dir={tmp_path}", "search=true", "seed=3"]
    plain = make_plan(load_config("mesh=cpu-8", "tokenizer=bytes", "model.dims.vocab=320", name="plan"))
    monkeypatch.setattr(module, "search", lambda *_: module.Found(plain, (), ()))
    monkeypatch.setattr(module, "check_writable", lambda path: print("checked"))
    monkeypatch.setattr(module, "file_plan", lambda path, *_: f"filed as {path.name}")
    for overrides, words in ((said, "llama3_1m_cpu-8.yaml filed as llama3_1m_cpu-8.yaml"), ([*said, other], "not written to ")):
        plan_verb.main(load_config(*overrides, name="plan"), overrides)
        out, err = capsys.readouterr()
        assert words in out
        assert ("checked" in out, "note: the plan found is not written" in err) == (overrides is said, overrides is not said)


def test_every_committed_plan_is_a_run():
    for path in (compose.conf_dir() / "plan").glob("*.yaml"):
        model, _, mesh = path.stem.rpartition("_")
        try:
            config = load_config(f"model={model}", f"mesh={mesh}")
        except ConfigError as error:
            pytest.fail(f"{path}: {error}")
        assert config.precision.compute == "bfloat16"
