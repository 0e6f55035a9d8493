"""The verb, and what it says."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import pytest

from llama_eqx import compose, load_config
from llama_eqx.errors import ConfigError, UserError
from llama_eqx.plan import main
from llama_eqx.planning import compile as compiling
from llama_eqx.planning.chips import CHIPS
from llama_eqx.planning.compile import TooBig, build_mesh
from llama_eqx.planning.estimate import Estimate, Traffic
from llama_eqx.planning.plan import figures, make_plan, report, shrink
from llama_eqx.verb import guarded

TINY = ["tokenizer=bytes", "model.dims.vocab=320", "train.seq_len=128", "train.batch_size=16"]


def config(*overrides):
    return load_config(*TINY, *overrides, name="plan")


@pytest.fixture(scope="module")
def plan():
    return make_plan(config("mesh=cpu-8"))


def test_virtual_devices_through_the_verb(tmp_path, capsys):
    overrides = [*TINY, "mesh=cpu-8", f"run_dir={tmp_path}"]
    main(load_config(*overrides, name="plan"), overrides)
    said = capsys.readouterr().out
    assert "8 x cpu: fsdp 8" in said
    assert "16 x 128 tokens = 256 per device" in said
    assert "no estimate" in said
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] is True
    assert found["tokens_per_device"] == 256
    assert found["peak_bytes_per_device"] == found["compiler"]["peak"] > found["memory_by_formula"]["parameters"] > 0
    assert found["step_seconds_estimate"] is found["mfu_causal_estimate"] is found["mfu_palm_estimate"] is None


def test_what_a_run_would_say_too():
    plan = make_plan(config("mesh=cpu-8", "+sharding.axes.vocabs=[tensor]"))
    assert plan.remarks == ("sharding.axes.vocabs splits nothing: no array has such an axis",)
    assert f"note                {plan.remarks[0]}" in report(plan)
    assert figures(plan)["remarks"] == [*plan.remarks]


def test_an_estimate_is_called_one(plan):
    traffic = {("all-gather", True): Traffic(3, 2**30, 0.5), ("all-reduce", False): Traffic(1, 2**20, 0.1)}
    timed = dataclasses.replace(plan, device_kind="TPU v4", estimate=Estimate(2.0, 1.9, 0.1, 0.3, traffic, ("loop x: unknown",)))
    said = report(timed)
    for line in said.splitlines():
        if any(word in line for word in ("step ", "speed", "MFU", "ms if alone")):
            assert "estimate" in line, line
    assert "asynchronous, 3 x, 1.00 GiB, 500.0 ms" in said
    assert "loop x: unknown" in said
    found = figures(timed)
    rate = 16 * 128 / 2.0 / 8
    assert found["mfu_causal_estimate"] == pytest.approx(rate * plan.flops.causal / 275e12)
    assert found["mfu_palm_estimate"] == pytest.approx(rate * plan.flops.palm / 275e12)
    assert {"kind": "all-reduce", "asynchronous": False, "count": 1, "bytes": 2**20, "seconds_estimate": 0.1} in found["collectives"]


def test_too_big(monkeypatch):
    def refuse(*args):
        raise TooBig("Used 3.0M of 2.0M", 3 * 2**20, 2 * 2**20)

    monkeypatch.setattr("llama_eqx.planning.plan.compile_step", refuse)
    plan = make_plan(config("mesh=cpu-8"))
    assert not plan.fits
    assert "no: too big by 1.0 MiB, needs 3.0 MiB of 2.0 MiB" in report(plan)
    assert figures(plan)["fits"] is False
    assert figures(plan)["peak_bytes_per_device"] == 3 * 2**20

    advice = shrink(plan, lambda *more: config("mesh=cpu-8", *more))
    assert advice.startswith("activations take most, 24.7 MiB by formula")
    for part, said in (("parameters", "the state of the model takes most"), ("logits", "logits take most")):
        memory = plan.memory._replace(**{part: 25 * 2**20})
        assert shrink(dataclasses.replace(plan, memory=memory, may=None), config).startswith(f"{said}, 2")


def test_the_hosts_bytes_are_not_the_devices():
    # What libtpu 0.0.42 says, in MiB, of a scan that keeps eight arrays of 32 MiB on the device, and of one that offloads them.
    sizes = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes", "peak_memory_in_bytes")
    kept, offloaded = (SimpleNamespace(**dict(zip(sizes, mib, strict=True))) for mib in ((160, 128, 0, 320, 512), (160, 128, 0, 129, 544)))
    assert compiling.device_peak(kept, host=0) == 512
    assert compiling.device_peak(offloaded, host=256) == 417
    offloaded.peak_memory_in_bytes = 400  # of both, when what is on the device is not there at the same time
    assert compiling.device_peak(offloaded, host=256) == 400


def test_too_big_for_the_host(plan):
    there = int(CHIPS["TPU v5"].host)  # bytes for each of its chips
    slice_ = dataclasses.replace(plan, device_kind="TPU v5")
    for size in (there, there + 2**30):
        offloaded = dataclasses.replace(slice_, compiled=plan.compiled._replace(host=size))
        assert offloaded.fits is figures(offloaded)["fits"] is (size == there)
    assert "no: needs 105.31 GiB of host memory per device, and the host has 104.31 GiB for each" in report(offloaded)


@pytest.mark.parametrize(
    ("may", "advice"),
    [
        (0.7, "it would fit with remat=full"),
        (0.2, "it would fit with remat=full train.microbatch_size=2 sharding=sequence mesh.sequence=4"),
        (0.001, "neither remat=full, a smaller train.microbatch_size nor sharding=sequence is enough: more devices"),
    ],
)
def test_advice_is_computed(plan, may, advice):
    small = dataclasses.replace(plan, compiled=None, needs=plan.memory.total, may=int(may * plan.memory.total))
    said = shrink(small, lambda *more: config("mesh=cpu-8", *more))
    assert advice in said
    if may > 0.1:
        better = config("mesh=cpu-8", *said.partition("it would fit with ")[2].split())
        assert make_plan(better).memory.total < small.may


def test_logits_are_advised_to_come_in_chunks(plan):
    whole = plan.memory._replace(logits=2 * plan.memory.total)
    said = shrink(dataclasses.replace(plan, memory=whole, needs=None, may=2 * plan.memory.total), lambda *more: config("mesh=cpu-8", *more))
    assert said.startswith("logits take most")
    assert said.endswith("it would fit with loss.chunk=2048")


def test_advice_where_the_tokenizer_settles_the_vocabulary(plan):
    """Which the overrides that are tried do not say."""
    small = dataclasses.replace(plan, compiled=None, needs=plan.memory.total, may=int(0.7 * plan.memory.total))
    assert "it would fit with" in shrink(small, lambda *more: config("mesh=cpu-8", "model.dims.vocab=null", *more))


def test_no_advice_where_no_candidate_can_be_composed(plan):
    def variant(*more):
        raise ConfigError("no such option", where="model")

    said = shrink(dataclasses.replace(plan, compiled=None, needs=plan.memory.total, may=1), variant)
    assert said.endswith("smaller settings could not be tried: no such option")


def test_advice_leaves_out_what_is_said_of_the_group_that_it_replaces(plan, monkeypatch, tmp_path, capsys):
    """Names that are kept go with remat=names alone. What was typed is no grammar of Hydra's."""
    big = dataclasses.replace(plan, compiled=None, needs=plan.memory.total, may=int(0.9 * plan.memory.total))
    monkeypatch.setattr("llama_eqx.planning.plan.make_plan", lambda config: big)
    said = [*TINY, "mesh=cpu-8", "remat=names", "remat.names=[q,k,v]", f"run_dir={tmp_path}/it's", "profile=true"]
    main(load_config(*map(compose.quoted, said), name="plan"), said)
    assert capsys.readouterr().out.count("it would fit with remat=full\n") == 1


def test_a_run_that_is_out_of_memory_names_its_plan(monkeypatch, capsys):
    def job():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes\nmore")

    for verb, named in (("train", True), ("generate", False)):
        monkeypatch.setattr(sys, "argv", [f"llama_eqx/{verb}.py", "model=llama2_7b", "data.path=my notes"])
        assert guarded(job) == 1
        said = capsys.readouterr().err
        assert "Out of memory allocating 7 bytes" in said
        assert ("python -m llama_eqx.plan model=llama2_7b 'data.path=my notes' says which part to shrink" in said) is named


def test_a_compiler_option_that_does_not_exist(capsys):
    """In a plan, and in whatever else compiles: a run does so in its first step."""
    with pytest.raises(ConfigError, match="the compiler has no option xla_foo"):
        make_plan(config("mesh=cpu-8", "+mesh.compiler_options.xla_foo=1"))
    assert guarded(lambda: jax.jit(lambda x: x + 1, compiler_options={"xla_foo": 1})(1)) == 2
    assert "next: ~mesh.compiler_options.xla_foo leaves it out" in capsys.readouterr().err


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs its compiler") as error:
        make_plan(config("mesh=v4-8"))
    assert "pip install 'llama_eqx[plan]'" in error.value.next


@pytest.mark.parametrize("mesh", sorted(path.stem for path in compose.conf_dir().glob("mesh/v*.yaml")))
def test_every_slice_can_be_described(mesh):
    pytest.importorskip("libtpu")
    config = load_config(f"mesh={mesh}").mesh
    assert build_mesh(config).size == config.devices


SIZES = ("embed=256", "heads=4", "kv_heads=2", "head_dim=64", "mlp=512", "layers=3", "vocab=1024")


def test_microbatches_compile_for_a_slice():
    """A head of its own, whose gradient is cast before it is added up, brought v4 and v5e to an error of the compiler's own."""
    pytest.importorskip("libtpu")
    dims = [f"model.dims.{size}" for size in (*SIZES, "layers=2")]
    rest = [
        "precision=mixed",
        "model.tied=false",
        "model.context=256",
        "train.seq_len=256",
        "train.batch_size=8",
        "train.microbatch_size=4",
    ]
    assert make_plan(load_config("mesh=v4-8", *dims, *rest, name="plan")).fits


@pytest.mark.slow
def test_a_slice():
    pytest.importorskip("libtpu")
    dims = [f"model.dims.{size}" for size in SIZES]
    rest = ["precision=mixed", "remat=full", "model.context=256", "train.seq_len=256", "train.batch_size=4"]
    plan = make_plan(load_config("mesh=v5e-4", *dims, *rest, name="plan"))
    assert plan.fits
    assert plan.estimate
    assert plan.estimate.doubts == ()
    assert 0 < plan.estimate.kernels < plan.estimate.compute < plan.estimate.step < 1
    assert any(kind in ("all-gather", "collective-permute") for kind, _ in plan.estimate.traffic)
