"""Wrong overrides by the hundred: each ends with code 2, one block and the nearest name, and none with a traceback."""

import json
import os
import pathlib
import random
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GROUPS = ("model", "data", "tokenizer", "mesh", "sharding", "precision", "remat", "optimizer", "schedule", "tracking", "model/norm")
GROUPS += ("model/attention", "model/feed_forward", "model/rotary", "model/block", "model/init")
SIZES = ["train.steps", "train.batch_size", "train.seq_len", "train.log_every", "train.eval_every", "train.unroll", "model.context"]
SIZES += [f"model.dims.{axis}" for axis in ("vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp")]
FRACTIONS = ["model.dropout", "optimizer.b1", "optimizer.b2", "data.validation_fraction"]
RATES = ["schedule.peak", "optimizer.clip_norm", "optimizer.eps", "optimizer.weight_decay", "model.norm.eps", "model.rotary.theta"]
# Composes each override of a list as the command line would, in one process, and says what came of it.
PROCESS = """
import contextlib, io, json, sys
from llama_eqx import train
from llama_eqx.verb import run_verb
from llama_eqx.errors import UserError

def started(config, overrides):
    raise SystemExit(0)

def attempt(override):
    sys.argv, said = ["train", *override.split(" ")], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            run_verb("train", started, log=False)
        except SystemExit as end:
            return end.code or 0, said.getvalue()

found = {override: attempt(override) for override in json.load(sys.stdin)}
backends = getattr(sys.modules.get("jax._src.xla_bridge"), "_backends", {})
print(json.dumps({"found": found, "jax": "jax" in sys.modules, "started": list(backends)}))
"""


def attempted(overrides) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        input=json.dumps(overrides),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def misspelt(word: str, rng: random.Random) -> str:
    """`word` with a letter of its last part dropped, doubled, swapped or changed."""
    head, dot, last = word.rpartition(".")
    i = rng.randrange(len(last) - 1)
    return (
        head
        + dot
        + rng.choice(
            [
                last[:i] + last[i + 1 :],
                last[: i + 1] + last[i:],
                last[:i] + last[i + 1] + last[i] + last[i + 2 :],
                f"{last[:i]}q{last[i + 1 :]}",
            ]
        )
    )


def typos(rng: random.Random) -> list[str]:
    from llama_eqx.compose import conf_dir, keys

    keys = [key for key in keys("train", []) if not key.startswith(("hydra", "_")) and "_target_" not in key and "/" not in key]
    long = [key for key in keys if "." in key and len(key.rpartition(".")[2]) > 3]
    options = [(group, path.stem) for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml")) if len(path.stem) > 3]
    wrong = [f"{misspelt(key, rng)}=3" for key in rng.choices(long, k=110)]
    wrong += [f"{group}={misspelt(option, rng)}" for group, option in rng.choices([pair for pair in options if pair[1][0] != "_"], k=60)]
    wrong += [f"{misspelt(group, rng)}=x" for group in rng.choices([group for group in GROUPS if "/" not in group], k=10)]
    known = {*keys, *(f"{group}={option}" for group, option in options)}
    return [override for override in wrong if override.partition("=")[0] not in known and override not in known]


def wrong_values(rng: random.Random) -> list[str]:
    words = ["many", "[1,2]", "{a:1}", "true", "''", "1.5", "1e400", "0x", "nan"]
    wrong = [f"{key}={rng.choice(words)}" for key in rng.choices(SIZES, k=40)]
    wrong += [f"{key}={rng.choice(['0', '-1', '-9999999999999999999999'])}" for key in rng.choices(SIZES, k=30)]
    wrong += [f"{key}={rng.choice(['-0.1', '1.5', 'nan', 'inf', 'half', '[]'])}" for key in rng.choices(FRACTIONS, k=20)]
    wrong += [f"{key}={rng.choice(['-1e-3', 'nan', '-inf', 'fast', 'true'])}" for key in rng.choices(RATES, k=20)]
    heads = [(heads, kv_heads) for heads in range(1, 33) for kv_heads in range(1, heads + 9) if heads % kv_heads]
    wrong += [f"model.dims.heads={heads} model.dims.kv_heads={kv_heads}" for heads, kv_heads in rng.sample(heads, 12)]
    wrong += [f"model.dims.head_dim={2 * rng.randrange(50) + 1}" for _ in range(3)]
    wrong += [f"mesh.{rng.choice(['data', 'fsdp', 'tensor'])}={rng.choice(['0', '-2', 'all', '1.5'])}" for _ in range(6)]
    wrong += [f"mesh={mesh}" for mesh in ("v7-32", "v4-31", "tpu", "32", "v4-", "h100")]
    wrong += ["train", "=3", "seed=-1", "seed=1,2", "seed=[1", "train.steps=", "~model", "+seed=2", "+train.more=1"]
    return [*wrong, "model.norm._target_=os.system"]


@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.faults)])
def test_typos(count):
    """They are answered before JAX is imported."""
    overrides = typos(random.Random(0))
    found = attempted(overrides[:: max(len(overrides) // count, 1)])
    assert not found["jax"]
    for override, (code, said) in found["found"].items():
        assert code == 2, f"{override}: {said}"
        assert "Traceback" not in said
        assert "did you mean" in said or "one of" in said or "--cfg job shows all" in said, f"{override}: {said}"
        assert len(said.splitlines()) <= 6, said
    near = [said for _, said in found["found"].values() if "did you mean" in said]
    assert len(near) > 0.8 * len(found["found"])  # a changed letter may make a word that is like no other


@pytest.mark.parametrize("count", [24, pytest.param(1000, marks=pytest.mark.faults)])
def test_values(count):
    """They are answered before JAX has started: no device was asked for."""
    overrides = wrong_values(random.Random(0))
    found = attempted(overrides[:: max(len(overrides) // count, 1)])
    assert found["started"] == []
    for override, (code, said) in found["found"].items():
        assert code == 2, f"{override}: {said}"
        assert "Traceback" not in said
        assert len(said.splitlines()) <= 6, said


def test_there_are_enough_of_them():
    assert len({*typos(random.Random(0)), *wrong_values(random.Random(0))}) >= 200


@pytest.mark.faults
@pytest.mark.parametrize("override", ["train.step=3", "model=lama2_7b", "mesh=v4_32", "train.steps=many", "model.dims.kv_heads=3"])
def test_as_commands(override, tmp_path):
    command = [sys.executable, "-m", "llama_eqx.train", override]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
