"""What the guide to scaling studies shows runs as it stands, and does what it says."""

import dataclasses
import pathlib
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from llama_eqx import load_config, load_pretrained
from llama_eqx.model.init import FanInInitConfig
from llama_eqx.sharding import parameter_names
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.starts import read_starts
from llama_eqx.training.loop import train

GUIDE = (pathlib.Path(__file__).parents[1] / "docs/scaling.md").read_text(encoding="utf-8")
BUDGET, READ, MUP = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
TEXT = pathlib.Path(__file__).parent / "golden" / "text.md"


@pytest.fixture
def mup(monkeypatch):
    monkeypatch.setitem(sys.modules, "guide_mup", module := types.ModuleType("guide_mup"))
    exec(MUP, vars(module))
    return module


def test_the_steps_of_a_budget():
    exec(BUDGET.replace("ladder_s", "llama3_1m"), names := {})
    products = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384) + 512 * 128
    assert names["steps"](6e11, "model=llama3_1m", "model.dims.vocab=512") == round(6e11 / 1024 / (6 * products + 6 * 4 * 128 * 128))


def test_a_branch_ends_with_the_bits_of_a_run_of_its_length(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(name, steps):
        sizes = {"layers": 1, "embed": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16}
        small = [f"model.dims.{axis}={size}" for axis, size in sizes.items()]
        small += ["data=text", f"data.path={TEXT}", "tokenizer=bytes", "tracking.wandb.mode=disabled", "train.batch_size=8"]
        small += ["train.seq_len=32", "train.log_every=1", "train.eval_every=100", "train.sample_tokens=0", "schedule=wsd"]
        small += ["schedule.warmup_steps=2", "schedule.decay_fraction=0.5", "checkpoint.every=6", "checkpoint.keep_every=6"]
        train(load_config(*small, f"train.steps={steps}", f"run_dir=ladder/{name}"))
        records = read_metrics(tmp_path / "ladder" / name / "metrics.jsonl")
        return [{key: value for key, value in record.items() if not key.startswith(("perf/", "data/starved"))} for record in records]

    stable = run("stable", 16)
    shutil.copytree("ladder/stable/checkpoints/6", "ladder/short/checkpoints/6")
    shutil.copy("ladder/stable/metrics.jsonl", "ladder/short")
    branch, whole = run("short", 2 + (6 - 2) * 2), run("whole", 10)
    assert [start["step"] for start in read_starts(pathlib.Path("ladder/short/provenance.jsonl"))] == [6]
    assert branch == whole
    rates, without = ([record["optim/lr"] for record in records if "optim/lr" in record] for records in (branch, stable))
    assert rates[:7] == without[:7]
    assert rates[7] < rates[6] == without[7]
    for mine, theirs in zip(*(jax.tree.leaves(load_pretrained(f"ladder/{name}")) for name in ("short", "whole")), strict=True):
        np.testing.assert_array_equal(mine, theirs)

    capsys.readouterr()
    exec(READ, {})
    short, long, again = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (short[1:], again[1:], long[1]) == (short[1:], short[1:], f"{16 * 256.0}")
    assert int(short[0]) == sum(leaf.size for leaf in jax.tree.leaves(load_pretrained("ladder/short")))


def test_initial_values_of_all_widths(tiny, mup):
    """At the base they are those of `fan_in`. The embedding's do not shrink with the width, and the head's shrink faster."""

    def built(embed, init):
        config = dataclasses.replace(tiny(f"model.dims.embed={embed}", "model.tied=false"), init=init)
        return config.build(key=jax.random.key(0))

    for ours, plain, embed, head in (
        (*(built(n, init) for init in (mup.MupInitConfig(base=32), FanInInitConfig(gain=1.0))), *s) for n, *s in ((32, 1, 1), (128, 2, 0.5))
    ):
        np.testing.assert_allclose(ours.embed, embed * plain.embed, rtol=1e-6)
        np.testing.assert_allclose(ours.lm_head, head * plain.lm_head, rtol=1e-6)
        for mine, theirs in zip(*(jax.tree.leaves(model.blocks) for model in (ours, plain)), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_matrices_of_wide_models_learn_more_slowly_and_decay_as_fast(tiny, mup):
    config = load_config()
    model = tiny("model.dims.embed=128", "model.tied=false").build(key=jax.random.key(0))
    ones = jax.tree.map(jax.numpy.ones_like, model)

    def updates(weight_decay):
        optimizer = mup.MupAdamWConfig(**vars(config.optimizer) | {"weight_decay": weight_decay}, base=32).build()
        return jax.tree.leaves(optimizer.update(ones, optimizer.init(model), model)[0])

    for name, parameter, update, decayed in zip(parameter_names(model), jax.tree.leaves(model), updates(0.0), updates(0.5), strict=True):
        np.testing.assert_allclose(update, 1 if name == "embed" or "norm" in name else 0.25, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(decayed - update, 0 if "norm" in name else 0.5 * parameter, atol=1e-6, err_msg=name)
